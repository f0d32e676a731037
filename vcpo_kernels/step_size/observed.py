"""What `EssLearningRate.observe` takes, and what it says of everything else."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.ess import EffectiveSampleSize, ess_moments

CHECK = Check("EssLearningRate.observe")
WANTED = "output must be a VCPOOutput, an EffectiveSampleSize or log-weights [B], or an ObjectiveOutput"
OF_TOKENS = "sequence_log_weights(stats.logp, behavior_logp, segments).detach()"


@runtime_checkable
class Observable(Protocol):
    """What a batch's result needs for its step to be scaled: a loss to watch, and `ess_moments` of its log-weights.

    `vcpo_loss`'s output and every objective's have both.
    """

    @property
    def loss(self) -> Tensor:
        """0-d. Gradients of it that are thrown away take the observation with them."""

    @property
    def ess_moments(self) -> Tensor:
        """float64 [3]."""


def moments_and_loss(output: Any) -> tuple[Tensor, Tensor | None]:
    """The ESS moments [3] of an observed output, and its loss where it has one.

    Raises TypeError, ValueError for what has no ESS, with what to pass instead.
    """
    if isinstance(output, Tensor):
        _check_log_weights(output)
        return ess_moments(output), None
    moments, loss = getattr(output, "moments", None), None
    if not isinstance(output, EffectiveSampleSize):
        if not isinstance(output, Observable):
            raise CHECK.type_error(f"{WANTED}, got {checks.describe(output)}. {_fix(output)}")
        moments, loss = output.ess_moments, output.loss
        CHECK.tensor("output.loss", loss)
    CHECK.tensor("output's ESS moments", moments, (torch.float64,))
    assert moments is not None
    CHECK.shape("output's ESS moments", moments, (3,), "log sum w, log sum w^2, B", "effective_sample_size makes them.")
    return moments.detach(), loss


def _check_log_weights(tensor: Tensor) -> None:
    if tensor.dim() == 0:
        raise CHECK.value_error(
            f"{WANTED}, got {checks.describe(tensor)}: one number has no ESS. "
            "Pass the whole output, not its loss, ess or ess_ratio: observe(out)."
        )
    CHECK.tensor("output", tensor, (torch.float32, torch.float64), "Of log-weights: .float().")
    if tensor.dim() > 1:
        raise CHECK.value_error(
            f"{WANTED}, got {checks.describe(tensor)}. Log-ratios of tokens are summed over each sequence: {OF_TOKENS}."
        )
    if tensor.requires_grad:
        raise CHECK.value_error(
            f"{WANTED}, got {checks.describe(tensor)} that requires a gradient, as a loss does. "
            "Pass the whole output: observe(out). If these are log-weights: .detach()."
        )


def _fix(output: Any) -> str:
    if isinstance(output, TokenStats):
        return f"Token statistics are of tokens: pass what the loss made of them, or {OF_TOKENS}."
    if isinstance(output, (list, tuple, dict, set)):
        return "Call observe once for each micro-batch's output."
    if hasattr(output, "__array__"):
        return "Log-weights as a tensor: torch.as_tensor(log_weights)."
    return "Pass what vcpo_loss or the objective returned: observe(out)."
