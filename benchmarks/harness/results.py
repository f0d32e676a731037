"""Result files. Of `make gpu`: JSON lines, each flushed when it is known, so that a kill leaves what was measured."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import machine

Row = dict[str, Any]

RESULTS = Path("benchmarks/results")  # committed, a folder per machine
MEASURED = Path("runs/bench")  # what is measured without being asked to go there
NAME = "results.jsonl"
# What makes a measurement the same one: a process that starts again does not repeat it.
KEY = ("work", "name", "rows", "vocabulary", "dtype")
# Rows are of these kinds. "time": verified and timed. "failure": wrong, or raised. "left out": not run, with the reason.
# "phase": a subprocess and how it ended. "check": something that is right or wrong and has no time.
KINDS = ("time", "failure", "left out", "phase", "check")


class ResultLog:
    """Appends to `folder`/results.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **fields: Any) -> Row:
        """Write one row at once."""
        assert kind in KINDS, kind
        row = {"kind": kind, **fields}
        with open(self.path, "a") as file:
            file.write(self._ending() + json.dumps(row) + "\n")
        return row

    def _ending(self) -> str:
        """A line break where a kill cut the last line short."""
        with open(self.path, "rb") as file:
            return "" if file.read()[-1:] in (b"", b"\n") else "\n"

    def rows(self) -> list[Row]:
        return read(self.path)

    def known(self) -> set[tuple[Any, ...]]:
        """Keys of all that has been measured or has failed."""
        return {key_of(r) for r in self.rows() if r["kind"] in ("time", "failure", "left out")}


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in KEY)


def read(path: Path) -> list[Row]:
    """The rows of a result file; a last line that a kill cut short is not one."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """The same rows as a table, a column for every field that occurs."""
    rows = list(rows)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def write_files(rows: list[Row], folder: Path, name: str) -> None:
    """A finished comparison: JSON lines, CSV, and the environment that it ran in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_csv(rows, folder / f"{name}.csv")
    (folder / machine.ENVIRONMENT).write_text(machine.environment())
