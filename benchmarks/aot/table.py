"""A committed table of machine code: the command's options, and a fresh table held against it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
REGISTER_SLACK = 1.10


def as_text(table: dict[str, Any], compiler: str, columns: dict[str, str], width: int) -> str:
    """A line per kernel. columns: fields of a row, and what stands above them. width: of the names."""
    named = {f"{a} {name}": row for a, rows in table["kernels"].items() for name, row in rows.items()}
    lines = [f"{compiler} {table[compiler]}", " " * width + "".join(f"  {heading}" for heading in columns.values())]
    for name, row in named.items():
        numbers = (f"{row[field]:{len(heading) + 2}}" for field, heading in columns.items())
        lines.append(f"{name:{width}}" + "".join(numbers))
    return "\n".join(lines)


def more_registers(table: Path, now: dict[str, Any], before: dict[str, Any] | None, same_compiler: bool) -> list[str]:
    """What is wrong with a kernel beside its committed row; registers depend on the compiler."""
    if before is None:
        return [f"not in {table.name}; run with --write"]
    if same_compiler and now["registers"] > REGISTER_SLACK * before["registers"]:
        return [f"{now['registers']} registers, was {before['registers']}"]
    return []


def options_of(module: str, doc: str | None) -> argparse.Namespace:
    """--check and --write, which both tables' commands have."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where a kernel is worse than the committed table")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    return parser.parse_args()


def held_against(
    path: Path,
    fresh: dict[str, Any],
    compiler: str,
    complaints: Callable[[dict[str, Any], dict[str, Any]], list[str]],
    options: argparse.Namespace,
) -> int:
    """Print what is wrong with a fresh table beside the committed one, written first where asked; the exit status.

    compiler: the key of both tables under which the version stands that made them.
    """
    if options.write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n")
    committed = json.loads(path.read_text())
    found = complaints(fresh, committed)
    equal = fresh[compiler] == committed[compiler]
    same = "registers compared" if equal else f"another {compiler}: registers not compared"
    print(f"\nagainst {path.name} ({compiler} {committed[compiler]}, {same}): {len(found)} complaints")
    print("\n".join(found))
    return 1 if options.check and found else 0
