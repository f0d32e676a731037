"""What an optimizer step costs in TRL's trainer, in ours, and in plain loops: time, and memory beyond what was there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.progress import Progress

from benchmarks.cases import steps
from benchmarks.cases.steps import GROUP, Batch, TrainerStep, Work
from benchmarks.harness.clock import Clock, Timed
from benchmarks.harness.memory import peak_extra_mib
from benchmarks.harness.results import Row

WHOLE, SPLIT = GROUP, GROUP // 2  # sequences of a micro-batch: a group, half of one


@dataclass(frozen=True)
class StepCase:
    """make(work, batch): a step. against: the case whose time its own is held against. gpu_only: its kernels have no CPU form,
    and replace transformers' own for every model of the process.
    """

    name: str
    against: str
    make: Callable[[Work, Batch], Callable[[], None]]
    gpu_only: bool = False


def _trainer(rows: int, ours: bool, **options: Any) -> Callable[[Work, Batch], Callable[[], None]]:
    return partial(steps.trainer_step, rows=rows, ours=ours, **options)


def _plain(loss: steps.Loss) -> Callable[[Work, Batch], Callable[[], None]]:
    return partial(steps.plain_step, loss_of=loss, rows=WHOLE)


GRPO, GRPO_SPLIT, EAGER = "GRPOTrainer", "GRPOTrainer, groups split", "plain loop, eager"
CASES = (
    StepCase(GRPO, GRPO, _trainer(WHOLE, ours=False)),
    StepCase("GRPOTrainer, use_liger_kernel", GRPO, _trainer(WHOLE, ours=False, use_liger_kernel=True), gpu_only=True),
    StepCase("VCPOTrainer", GRPO, _trainer(WHOLE, ours=True)),
    StepCase("VCPOTrainer, exact norms", GRPO, _trainer(WHOLE, ours=True, score_norm="exact")),
    StepCase(GRPO_SPLIT, GRPO_SPLIT, _trainer(SPLIT, ours=False)),
    StepCase("VCPOTrainer, groups split", GRPO_SPLIT, _trainer(SPLIT, ours=True)),
    StepCase(EAGER, EAGER, _plain(steps.eager_loss)),
    StepCase("plain loop, token_stats", EAGER, _plain(steps.logits_loss)),
    StepCase("plain loop, fused head", EAGER, _plain(steps.fused_loss)),
)


def measure(work: Work, clock: Clock, progress: Progress, cases: tuple[StepCase, ...] = CASES) -> tuple[list[Row], Row]:
    """Rows of the cases that run here, and why the others do not, by name."""
    task = progress.add_task(work.name, total=None)
    batch = Batch.of(work.make_model())
    left_out = {c.name: "its kernels need a GPU" for c in cases if c.gpu_only and clock.device.type == "cpu"}
    calls: dict[str, Callable[[], None]] = {}
    rows: list[Row] = []
    for case in cases:
        if case.name in left_out:
            continue
        progress.update(task, description=f"{work.name}: weighing {case.name}")
        calls[case.name] = case.make(work, batch)
        peak = peak_extra_mib(clock.device, calls[case.name])
        rows.append({"work": work.name, "name": case.name, "against": case.against, "peak_extra_mib": peak})
    progress.update(task, description=f"{work.name}: timing")
    times = dict(zip(calls, clock.in_turn([Timed(call) for call in calls.values()]), strict=True))
    progress.remove_task(task)
    for row in rows:
        of_case, base = times[row["name"]], times[row["against"]]
        row |= of_case.fields(digits=1)
        row["of_base"] = round(of_case.median_ms / base.median_ms, 3)
        row["of_base_memory"] = _of_base_memory(row, rows)
    for call in calls.values():
        if isinstance(call, TrainerStep):
            call.close()
    return rows, left_out


def _of_base_memory(row: Row, rows: list[Row]) -> float | None:
    base = next(r["peak_extra_mib"] for r in rows if r["name"] == row["against"])
    peak = row["peak_extra_mib"]
    return None if peak is None or not base else round(peak / base, 3)
