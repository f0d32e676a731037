"""Measures one part of the plan and appends to the result file: python -m benchmarks.gpu.bench PART --out FOLDER.

Nothing is timed before its result agrees with float64. Where the device itself is lost to an error, the process ends with
plan.BROKEN, and the next one goes on with what has not been tried.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.cases import head_peers, rows_peers
from benchmarks.cases import rows as row_cases
from benchmarks.gpu.jobs import head, rows, sequences
from benchmarks.gpu.jobs.workbench import Workbench, clock_of
from benchmarks.gpu.plan import PLANS
from benchmarks.harness.results import ResultLog


def headline(bench: Workbench) -> None:
    """What the targets are about."""
    rows.ours(bench, bench.plan.headline, row_cases.CASES)
    sequences.coefficients(bench)
    sequences.launches(bench)
    head.ours(bench)


def peers(bench: Workbench) -> None:
    """What others have, on the same inputs. Last the compiled ones, which take longer than everything else."""
    rows.peers(bench, (*rows_peers.KERNELS, *rows_peers.EAGER))
    head.peers(bench, head_peers.KERNELS)
    rows.peers(bench, rows_peers.COMPILED)


def shapes(bench: Workbench) -> None:
    """The rest of the grid, most important first, until the time is up."""
    for shape in bench.plan.shapes:
        rows.ours(bench, shape, row_cases.GRID)


PARTS: dict[str, Callable[[Workbench], None]] = {"headline": headline, "peers": peers, "shapes": shapes}


def main(arguments: list[str] | None = None) -> None:
    """Run one part for `--seconds`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=main.__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", choices=PLANS, default="gpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    plan, log = PLANS[options.plan], ResultLog(options.out)
    PARTS[options.part](Workbench(plan, clock_of(plan), log, started + options.seconds, log.known()))


if __name__ == "__main__":
    main()
