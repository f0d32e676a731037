"""Whether an optimizer step's micro-batches are read once or twice.

A baseline is of whole groups. Where a group's completions all lie in one micro-batch (on one process, or on those that run it
at the same time), the forward that takes their statistics is the one that is differentiated. Where a group is split over the
micro-batches of a window, a pass without gradients takes the statistics of all of them first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.utils import logging

from vcpo_kernels.integrations.trl.window import Counts

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Way:
    """one_pass: statistics and gradients from one forward. across: groups are whole over all processes' micro-batches
    together, and not on each. why: in words, for the log.
    """

    one_pass: bool
    across: bool
    why: str


def way_of(trainer: Any) -> Way:
    """A generation is consecutive groups; a process holds consecutive rows of it, a micro-batch consecutive rows of those."""
    args, processes, group = trainer.args, trainer.accelerator.num_processes, trainer.num_generations
    rows = args.per_device_train_batch_size
    if args.score_norm == "exact" and (why := _beside_exact_norms(trainer)):
        return Way(False, False, f"score_norm='exact' forms gradients of whole sequences alone, and there is {why}")
    if rows % group == 0:
        return Way(True, False, f"micro-batches of {rows} hold whole groups of {group}")
    if args.steps_per_generation == 1:
        return Way(True, True, f"the micro-batches of {processes} processes together hold whole groups of {group}")
    return Way(
        False, False,
        f"groups of {group} are split over micro-batches of {rows}. per_device_train_batch_size as a multiple of {group} "
        "would save a forward pass",
    )  # fmt: skip


def _beside_exact_norms(trainer: Any) -> str:
    """What needs a backward of its own; empty: nothing."""
    needs = {
        "a KL penalty": trainer.beta != 0.0,
        "an entropy bonus": trainer.entropy_coef != 0.0,
        "a router loss": trainer.aux_loss_enabled,
        "a GradScaler": trainer.accelerator.scaler is not None,
        "DeepSpeed's engine": trainer.is_deepspeed_enabled,
    }
    return next((what for what, is_there in needs.items() if is_there), "")


def say(way: Way, main_process: bool) -> None:
    """Once, where it costs something that a setting would save."""
    if main_process:
        told = logger.info if way.one_pass else logger.warning
        told(f"VCPOTrainer: {'one pass' if way.one_pass else 'two passes'} over each micro-batch: {way.why}.")


@dataclass
class OpenWindow:
    """A window in one pass: its micro-batches, its counts, and the columns of those that the model has seen."""

    batches: list[dict[str, Any]]
    counts: Counts
    columns: list[Tensor] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.columns) == len(self.batches)
