"""Set-ups that a trainer cannot read off its options, refused by name; and what is worth a warning."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

import vcpo_kernels as vk
from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations._idle import IdleWatch


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


MAKE_STALE = (
    "To correct for staleness, let a generation serve several steps (num_iterations > 1, or steps_per_generation > "
    "gradient_accumulation_steps); to correct for the sampler, sample by another engine (use_vllm=True) or return "
    '"logprobs" from rollout_func. docs/trl.md, "What log mu is".'
)


def idle_watch(trainer: Any) -> IdleWatch:
    """Patient for two generations, and for ten windows: the first of a generation is always the policy that sampled."""
    args = trainer.args
    windows = -(-args.steps_per_generation * trainer.num_iterations // args.gradient_accumulation_steps)
    return IdleWatch(type(trainer).__name__, max(10, 2 * windows))


def watch_idleness(watch: IdleWatch, metrics: dict[str, float], batches: list[dict[str, Any]]) -> None:
    """Warn, once, of a run whose weights are all 1. metrics: of the window, on the host. batches: its micro-batches."""
    recorded = ("sampling_per_token_logps", "old_per_token_logps")
    if all(batch.get(name) is None for batch in batches for name in recorded):
        watch.certain(
            "a generation serves one optimizer step, and no log-probabilities of the sampler came with it", MAKE_STALE
        )
    means = (metrics["ess_ratio"], metrics["log_weight_mean"], metrics["log_weight_max"])
    watch.see(*means, "the sampler's log-probabilities have been the trainer's own so far", MAKE_STALE)
