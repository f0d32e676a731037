"""The single command: runs every phase and writes one folder. Exit status 0: nothing failed; 1: see the report's top."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.cases.rows import GRID
from benchmarks.gpu import phases, targets
from benchmarks.gpu.plan import DRY, GPU, Plan
from benchmarks.harness.results import ResultLog
from benchmarks.report import gpu_plots, gpu_run

OUTPUTS = ("results.jsonl", "results.csv", "report.md", "environment.json", "tests.log", "sanitizer.log", "run.log",
           "plots.png")  # fmt: skip


def run(plan: Plan, out: Path) -> bool:
    """All phases in order; the report is written again after each. Returns whether nothing failed."""
    until = time.monotonic() + plan.total_seconds
    for name in OUTPUTS:  # of an earlier run
        (out / name).unlink(missing_ok=True)
    log = ResultLog(out)
    place = phases.Workplace(plan, out)
    for phase in plan.phases:
        print(f"{phase.name} ...", flush=True)
        outcome = phases.run_phase(phase, place, until - time.monotonic())
        log.add("phase", phase=phase.name, status=outcome.status, seconds=round(outcome.seconds, 1), tail=outcome.tail)
        print(f"{phase.name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
        write_report(out, plan)
    try:
        works = [case.work for case in GRID]
        gpu_plots.draw(out, plan.headline.fields(), works, plan.backends, plan.dry)
    except Exception as error:  # a picture is not worth a run's results
        print(f"no plots.png: {type(error).__name__}: {error}")
    text, clean = summary(out, plan)
    print(text)
    return clean


def write_report(out: Path, plan: Plan) -> None:
    """report.md and results.csv from results.jsonl as it stands."""
    gpu_run.write(out, targets.table(gpu_run.rows_of(out), plan), plan.dry)


def summary(out: Path, plan: Plan) -> tuple[str, bool]:
    """A short text for the terminal, and whether nothing failed."""
    rows = gpu_run.rows_of(out)
    judged = [f"targets: {targets.counts(rows, plan)}", *targets.table(rows, plan)]
    return gpu_run.summary(out, judged, plan.dry)


def main() -> None:
    """Build, test, sanitize and measure on this machine's GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu/results"))
    parser.add_argument("--dry-run", action="store_true", help="the harness at tiny shapes on the CPU: no GPU figures")
    options = parser.parse_args()
    sys.exit(0 if run(DRY if options.dry_run else GPU, options.out.resolve()) else 1)


if __name__ == "__main__":
    main()
