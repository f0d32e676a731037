"""The methods under comparison, in a table: the loss, and whether the effective sample size scales the step.

Every loss is a function of the token statistics, the behaviour policy's logp, the rewards, the sequences per
prompt and the segments. All of them start from `vk.vcpo_loss`, whose output carries the batch's ESS,
advantages and log-weights whatever the method; a method that the package's switches do not reach replaces its
loss. Adding one is a function and a line in `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import vcpo_kernels as vk

Loss = Callable[[vk.TokenStats, Tensor, Tensor, int, vk.Segments], vk.VCPOOutput]

MAX_SEQUENCE_WEIGHT = 8.0
MAX_TOKEN_WEIGHT = 2.0


def vcpo(
    stats: vk.TokenStats, behavior_logp: Tensor, rewards: Tensor, groups: int, segments: vk.Segments
) -> vk.VCPOOutput:
    """Truncated sequence weights and the off-policy optimal baseline, its norms taken from the logits."""
    config = vk.VCPOConfig(max_weight=MAX_SEQUENCE_WEIGHT)
    return vk.vcpo_loss(stats, behavior_logp, rewards, groups, segments, config)


def sequence_truncated(
    stats: vk.TokenStats, behavior_logp: Tensor, rewards: Tensor, groups: int, segments: vk.Segments
) -> vk.VCPOOutput:
    """Truncated sequence weights and the group's mean reward as baseline."""
    config = vk.VCPOConfig(max_weight=MAX_SEQUENCE_WEIGHT, baseline_weighting="mean")
    return vk.vcpo_loss(stats, behavior_logp, rewards, groups, segments, config)


def sequence_masked(
    stats: vk.TokenStats, behavior_logp: Tensor, rewards: Tensor, groups: int, segments: vk.Segments
) -> vk.VCPOOutput:
    """Sequence weights, with sequences above the limit dropped instead of truncated."""
    out = sequence_truncated(stats, behavior_logp, rewards, groups, segments)
    kept = out.log_weights <= math.log(MAX_SEQUENCE_WEIGHT)
    coefficients = torch.where(kept, out.coefficients, 0.0)
    return replace(out, loss=-(coefficients * segments.sum(stats.logp)).sum())


def token_truncated(
    stats: vk.TokenStats, behavior_logp: Tensor, rewards: Tensor, groups: int, segments: vk.Segments
) -> vk.VCPOOutput:
    """Each token weighted by its own truncated ratio."""
    out = sequence_truncated(stats, behavior_logp, rewards, groups, segments)
    weights = (stats.logp.detach() - behavior_logp).exp().clamp(max=MAX_TOKEN_WEIGHT)
    return replace(out, loss=-(out.advantages * segments.mean(weights * stats.logp)).mean())


def uncorrected(
    stats: vk.TokenStats, behavior_logp: Tensor, rewards: Tensor, groups: int, segments: vk.Segments
) -> vk.VCPOOutput:
    """Every weight 1: the policy gradient as if the rollouts were fresh."""
    out = sequence_truncated(stats, behavior_logp, rewards, groups, segments)
    return replace(out, loss=-(out.advantages * segments.mean(stats.logp)).mean())


@dataclass(frozen=True)
class Method:
    """title: for figures. loss: see the module. step_rule: of `vk.EssLearningRate`; None: full steps."""

    title: str
    loss: Loss
    step_rule: str | None = None


METHODS: dict[str, Method] = {
    "none": Method("no correction", uncorrected),
    "token-tis": Method("token truncated IS (2.0)", token_truncated),
    "seq-tis": Method("sequence truncated IS (8.0)", sequence_truncated),
    "seq-mask": Method("sequence mask (8.0)", sequence_masked),
    "ess": Method("ESS step alone", sequence_truncated, "sqrt"),
    "opob": Method("OPOB alone", vcpo),
    "vcpo": Method("VCPO (ESS step and OPOB)", vcpo, "sqrt"),
}
