"""Entries for vcpo_kernels/core/measured.py from a result file: python -m benchmarks.gpu.choose RESULTS_FOLDER.

CUDA wins a width where it was faster than Triton at some number of rows by more than both spreads, and slower by more than
them at none. Neighbouring widths that it won are one range: nothing is claimed beyond the widths that were measured.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from benchmarks.cases.rows import BACKWARD, FORWARD, SCORE
from benchmarks.harness.results import NAME, Row, read
from vcpo_kernels.core.measured import Win

# What decides for an op. A forward and its backward are served by one choice, and must both gain or stay.
WORKS = {"token_stats": (FORWARD, BACKWARD), "score_rows": (SCORE,)}
CHALLENGER, HOLDER = "cuda", "triton"


def verdict(challenger: Row, holder: Row) -> int:
    """1 where the challenger is faster by more than the spread of both, -1 where the holder is, else 0."""
    margin = 1 + challenger["spread"] + holder["spread"]
    ours, theirs = challenger["median_ms"], holder["median_ms"]
    return 1 if ours * margin < theirs else -1 if theirs * margin < ours else 0


def verdicts(rows: list[Row]) -> dict[tuple[str, str, int], list[int]]:
    """By op, dtype and width: a verdict for every work and number of rows that both were timed at on a GPU."""
    timed = {(r["work"], r["dtype"], r["vocabulary"], r["rows"], r["name"]): r
             for r in rows if r["kind"] == "time" and r["device"] == "cuda"}  # fmt: skip
    found = defaultdict(list)
    for op, works in WORKS.items():
        for (work, dtype, vocabulary, count, name), row in timed.items():
            other = timed.get((work, dtype, vocabulary, count, HOLDER))
            if work in works and name == CHALLENGER and other is not None:
                found[op, dtype, vocabulary].append(verdict(row, other))
    return dict(found)


def wins(rows: list[Row]) -> tuple[Win, ...]:
    """The table's entries, ranges of neighbouring widths together."""
    measured = verdicts(rows)
    entries = []
    for op, dtype in dict.fromkeys((op, dtype) for op, dtype, _ in measured):
        run: list[int] = []
        for vocabulary in sorted(v for o, d, v in measured if (o, d) == (op, dtype)):
            of_width = measured[op, dtype, vocabulary]
            if max(of_width) > 0 and min(of_width) >= 0:
                run.append(vocabulary)
            elif run:
                entries.append(Win(op, dtype, run[0], run[-1]))
                run = []
        if run:
            entries.append(Win(op, dtype, run[0], run[-1]))
    return tuple(entries)


def main() -> None:
    """Print MEASURED's entry for the device of a result folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.choose", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    devices = json.loads((folder / "environment.json").read_text())["devices"]
    if not devices:
        raise SystemExit(f"{folder} is no run on a GPU: nothing can be chosen from it.")
    print(f"    # {devices[0]['name']}")
    print(f"    {tuple(devices[0]['capability'])}: (")
    for win in wins(read(folder / NAME)):
        print(f"        {win},")
    print("    ),")


if __name__ == "__main__":
    main()
