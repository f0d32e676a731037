"""SequenceGradients against a plain step and against one trajectory at a time."""

from __future__ import annotations

from functools import partial

from rich.progress import Progress

from benchmarks.cases.case import Case
from benchmarks.cases.sequence_gradients import CASES, ERROR_BOUND, Batch, oracle
from benchmarks.harness import verify
from benchmarks.harness.clock import Clock, Timed
from benchmarks.harness.memory import peak_extra_mib
from benchmarks.harness.results import Row


def step(case: Case[Batch], x: Batch) -> object:
    x.model.zero_grad()
    return case.run(x)


def measure(x: Batch, clock: Clock, progress: Progress) -> list[Row]:
    """Verify and weigh each case, then time all of them in turn."""
    task = progress.add_task("float64 oracle", total=None)
    want = oracle(x)
    rows: list[Row] = []
    calls = [partial(step, case, x) for case in CASES]
    for case, call in zip(CASES, calls, strict=True):
        progress.update(task, description=f"verifying {case.name}")
        error = case.error(call(), want)
        verify.require(case.name, error, ERROR_BOUND)
        # The gradients of the call before are there when it starts, and its own when it ends: they are not in the peak.
        peak = peak_extra_mib(clock.device, call)
        rows.append({"name": case.name, "against": case.against, "max_error": error, "peak_extra_mib": peak})
    progress.update(task, description="timing")
    times = dict(zip((case.name for case in CASES), clock.in_turn([Timed(call) for call in calls]), strict=True))
    progress.remove_task(task)
    for row in rows:
        of_case, base = times[row["name"]], times[row["against"]]
        row |= of_case.fields(digits=2)
        row["of_plain"] = round(of_case.median_ms / base.median_ms, 3)
    return rows
