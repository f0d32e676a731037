"""Objectives whose ratio belongs to a whole sequence: GSPO, GSPO-token, GMPO.

Layer: tokens [N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.scalars import clamped
from vcpo_kernels.objectives.build import TokenTerms
from vcpo_kernels.objectives.clipped import ClippedObjective
from vcpo_kernels.objectives.token_objective import TokenObjective
from vcpo_kernels.objectives.tokens import TokenBatch, exp_or_drop, require_sequence_advantages, times


@dataclass(frozen=True, kw_only=True)
class GSPOToken(ClippedObjective):
    """GSPO-token: GSPO's ratio in value, each token's own in gradient, s_it = sg[s_i] pi_t / sg[pi_t].

    Token objective min(s_it A_t, clip(s_it, 1 - clip_low, 1 + clip_high) A_t) (arXiv 2507.18071, eqs. 13 and 14; verl's
    "gspo"). Advantages are A_t, or A_i [B]: then it is `gspo`, in value and gradient.

    Hyperparameters:
        clip_low, clip_high: as in `gspo`.

    Metrics: as `gspo`.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() + torch.tensor([[1.0, -1.0]])
    >>> seg = vk.Segments.padded(torch.ones(1, 2))
    >>> objectives.gspo_token(stats, mu, torch.tensor([[1.0, -2.0]]), seg).coefficients
    tensor([[ 0.5000, -1.0000]])
    """

    name: ClassVar[str] = "gspo_token"

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        return self.clipped(tokens.sequence_mean(tokens.log_ratio), tokens.advantages, per_sequence=True)


@dataclass(frozen=True, kw_only=True)
class GSPO(GSPOToken):
    """GSPO: PPO's clip on the geometric mean of a sequence's ratios, s_i = exp(mean_t log r_t).

    Sequence objective min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) (arXiv 2507.18071, eqs. 5 to 7); gradient
    s A (1/|T|) sum_t grad logp_t where unclipped. TRL: importance_sampling_level "sequence" with loss_type "grpo".
    Advantages are A_i [B]; for advantages by token there is `gspo_token`.

    Hyperparameters:
        clip_low, clip_high: as in `ppo_clip`; the paper's are a thousand times tighter than PPO's, since s is a mean.
        aggregation: the paper's is the default; the others weigh a sequence by its length.

    Metrics: clip_fraction, clip_low_fraction, clip_high_fraction, by token.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() + torch.tensor([[1.0, -1.0]])  # the ratios' geometric mean is 1
    >>> objectives.gspo(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 0.5000]])
    """

    name: ClassVar[str] = "gspo"

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        require_sequence_advantages(self.check, tokens, "Use gspo_token for advantages by token.")
        return super().rule(tokens)


@dataclass(frozen=True, kw_only=True)
class GMPO(TokenObjective):
    """GMPO: the geometric mean of ratios that are clipped one by one, exp(mean_t clip(log r_t)) A.

    The clip acts on log r_t in [-log_clip_low, log_clip_high] and on the side of A's sign alone: above for A > 0, below for
    A < 0 (arXiv 2507.20673, eq. 4 and its code; verl's "geo_mean", TRL's experimental GMPOTrainer). Gradient
    s A (1/|T|) grad logp_t at the tokens that are not clipped. A mean of e^80 and more (A < 0) is dropped and counted.
    Advantages are A_i [B].

    Hyperparameters:
        log_clip_low, log_clip_high: bounds of log r, >= 0.
        aggregation: the paper's is the default; the others weigh a sequence by its length.

    Metrics: clip_fraction, clip_low_fraction, clip_high_fraction.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])  # the second counts as 0.4, and has no gradient
    >>> objectives.gmpo(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.6107, 0.0000]])
    """

    name: ClassVar[str] = "gmpo"

    log_clip_low: float = 0.4
    log_clip_high: float = 0.4

    def checked(self, check: Check) -> dict[str, Any]:
        return self.each(check.finite_float, "log_clip_low", "log_clip_high", minimum=0.0)

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        require_sequence_advantages(self.check, tokens)
        d, a, low, high = tokens.log_ratio, tokens.advantages, -self.log_clip_low, self.log_clip_high
        clipped_high, clipped_low = (a > 0) & (d > high), (a < 0) & (d < low)
        bounded = torch.where(a > 0, clamped(d, high=high), clamped(d, low=low))
        values = times(exp_or_drop(tokens.sequence_mean(bounded)), a)
        flat = clipped_high | clipped_low
        metrics = {"clip_fraction": flat, "clip_low_fraction": clipped_low, "clip_high_fraction": clipped_high}
        return TokenTerms(torch.where(flat, 0.0, values), values, metrics, per_sequence=True)
