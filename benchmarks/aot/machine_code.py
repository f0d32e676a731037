"""What the compiler made of a kernel, read off its machine code by the tools that triton brings. No GPU is needed."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

REGISTER_SLACK = 1.10


@dataclass(frozen=True)
class Resources:
    """registers: per thread. spills: local-memory instructions. shared_bytes: static, and dynamic where the launch is known.

    load_bits, store_bits: widest access to global memory.
    """

    registers: int
    spills: int
    shared_bytes: int
    load_bits: int
    store_bits: int


def run_tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """Output of cuobjdump or nvdisasm."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, cwd=folder).stdout


def registers_and_shared(usage: str) -> tuple[int, int]:
    """From one function's line of `cuobjdump --dump-resource-usage`."""
    registers, shared = (int(re.findall(rf"\b{what}:(\d+)", usage)[0]) for what in ("REG", "SHARED"))
    return registers, shared


def spills(sass: str) -> int:
    """Instructions that go to local memory."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def widest(sass: str, instruction: str) -> int:
    """Bits of the widest access; one without a width in its name moves 32."""
    suffixes = re.findall(rf"\b{instruction}((?:\.\w+)*)", sass)
    bits = (re.search(r"\.(?:[US])?(8|16|64|128|256)\b", s) for s in suffixes)
    return max((int(b[1]) if b else 32 for b in bits), default=0)


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
