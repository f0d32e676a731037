"""prime-rl: VCPO's loss as a custom loss, `[trainer.loss] type = "custom"`. docs/prime_rl.md has the two files it takes.

prime-rl calls a loss once per sequence with 1-D tensors, sums what it returns over the sequences of a micro-batch, and
divides by the number of rl tokens of the whole step on all ranks. So k is that of "token-mean", and no other can be had.
Written against the documented `fn(inputs: LossInputs, **kwargs) -> LossOutputs`; nothing here imports prime-rl.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations import _ess_channel
from vcpo_kernels.integrations._given_advantages import weighted_advantages
from vcpo_kernels.sequences.segments import Segments

WHERE = "vcpo_loss (prime-rl)"
CHECK = Check(WHERE)

attach_to_next_optimizer = _ess_channel.attach_to_next_optimizer


def vcpo_loss(inputs: Any, max_weight: float | None = 8.0) -> Any:
    """VCPO's loss of one sequence: gradient -w^ A_t u_t grad log pi_t, value -sum_t w^ A_t u_t over the loss mask.

    w^ = exp(min(L, log max_weight)), detached, L = sum_t m_t (trainer_logprobs_t - inference_logprobs_t); u the component's
    loss_weights (None: 1). L is announced to the optimizer's EssLearningRate (`attach_to_next_optimizer`), which takes ESS
    over all sequences of the step and all ranks.

    Args:
        inputs: prime-rl's LossInputs, tensors [seq]. ref_logprobs is not read.
        max_weight: from `[trainer.loss.kwargs]`; TOML has no null, 0 stands for no truncation.

    Returns:
        The LossOutputs of the module that LossInputs came from; metrics are 0-d tensors, averaged over sequences by prime-rl.

    Raises:
        TypeError, ValueError: naming what is missing or of the wrong shape.
    """
    logp, behavior_logp, advantages, loss_mask = (
        _field(inputs, name) for name in ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    )
    if max_weight is not None and not isinstance(max_weight, torch.Tensor) and max_weight == 0:
        max_weight = None
    loss_weights = getattr(inputs, "loss_weights", None)
    if loss_weights is not None:
        CHECK.shape("inputs.loss_weights", loss_weights, advantages.shape, "inputs.advantages.shape")
        advantages = advantages * loss_weights
    segments = Segments.padded(loss_mask[None])
    result = weighted_advantages(CHECK, logp, behavior_logp, advantages, segments, max_weight)
    loss = result.surrogate(logp).sum()
    how = (
        "Name a module of your own in import_path, with attach_to_next_optimizer() and vcpo_loss from "
        "vcpo_kernels.integrations.prime_rl in it (docs/prime_rl.md)."
    )
    _ess_channel.publish(WHERE, result, loss, how)
    metrics = {
        "vcpo/log_weight": result.metrics["log_weight_mean"],
        "vcpo/truncated": result.metrics["truncated_fraction"],
        "vcpo/nonfinite": result.metrics["nonfinite_sequences"],
        **{f"vcpo/{name}": result.metrics[name] for name in ("log_ratio_abs_mean", "log_ratio_negative_fraction")},
        **{f"vcpo/last_step_{name}": value for name, value in _last_step(loss.device).items()},
    }
    return _loss_outputs(inputs)(loss=loss, metrics=metrics)


def _field(inputs: Any, name: str) -> torch.Tensor:
    value = getattr(inputs, name, None)
    CHECK.tensor(f"inputs.{name}", value, fix="Pass prime-rl's LossInputs.")
    if value.dim() != 1:  # type: ignore[union-attr]
        raise CHECK.value_error(f"inputs.{name} must be [seq], one sequence per call, got {checks.describe(value)}.")
    return value  # type: ignore[return-value]


def _last_step(device: torch.device) -> dict[str, torch.Tensor]:
    """ESS ratio and the factor of the rate at the last step, once there was one."""
    if (last := _ess_channel.last_step()) is None:
        return {}
    return {name: value.float().to(device) for name, value in zip(("ess_ratio", "lr_scale"), last, strict=True)}


def _loss_outputs(inputs: Any) -> Any:
    """LossOutputs stands beside LossInputs, in prime-rl and in whatever carries its two dataclasses."""
    module = sys.modules.get(type(inputs).__module__)
    outputs = getattr(module, "LossOutputs", None)
    if outputs is None:
        raise CHECK.type_error(
            f"inputs must be prime-rl's LossInputs, whose module has LossOutputs too, "
            f"got {checks.describe(type(inputs))}."
        )
    return outputs
