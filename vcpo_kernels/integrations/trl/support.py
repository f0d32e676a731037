"""Set-ups that a trainer cannot read off its options, refused by name; and what is worth a warning."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

import vcpo_kernels as vk
from vcpo_kernels.core.checks import Check


def check_support(trainer: Any) -> None:
    """Raise ValueError for a launcher, model or adapter that VCPOTrainer does not support."""
    check = Check(type(trainer).__name__)
    if trainer.is_deepspeed_enabled:
        raise check.value_error(
            "DeepSpeed is not supported: its engine steps inside backward, before the window's rate is known. "
            "Launch with DistributedDataParallel (torchrun, or accelerate without a DeepSpeed plugin)."
        )
    if trainer.is_fsdp_enabled:
        raise check.value_error(
            "FSDP is not supported: sharded parameters are untested here. Launch with DistributedDataParallel "
            "(torchrun, or accelerate without an FSDP plugin)."
        )
    if getattr(trainer, "_is_vlm", False):
        raise check.value_error("vision-language models are not supported. Train a text model, or use GRPOTrainer.")
    if trainer.args.score_norm == "exact":
        try:
            vk.SequenceGradients(trainer.accelerator.unwrap_model(trainer.model))
        except (TypeError, ValueError) as error:
            raise check.value_error(
                f"score_norm='exact' does not work with this model. Set score_norm='logit'. {error}"
            ) from error


def warn_of_dropout(model: nn.Module, disabled: bool) -> None:
    """The two passes of a window draw different dropout, as TRL's old log-probabilities do."""
    active = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if active and not disabled:
        warnings.warn(
            f"VCPOTrainer: dropout is active ({active[0]} and {len(active) - 1} more): a window's weights are then taken under "
            "other dropout than its gradients. Set disable_dropout=True.",
            UserWarning,
            stacklevel=3,
        )
