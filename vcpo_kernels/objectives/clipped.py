"""Objectives that clip the ratio of each token: PPO/GRPO, CISPO.

Layer: tokens [N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.scalars import Number, clamped, log, log1p
from vcpo_kernels.objectives.build import TokenTerms
from vcpo_kernels.objectives.correction import Correction, check_bounds, corrected_weights
from vcpo_kernels.objectives.token_objective import TokenObjective
from vcpo_kernels.objectives.tokens import TokenBatch, exp_or_drop, times


@dataclass(frozen=True, kw_only=True)
class ClippedObjective(TokenObjective):
    """Methods with PPO's clip. clip_low, clip_high: the bounds' distances from 1; clip_low >= 1: no lower bound."""

    clip_low: float = 0.2
    clip_high: float = 0.2

    def checked(self, check: Check) -> dict[str, Any]:
        return self.each(check.finite_float, "clip_low", "clip_high", minimum=0.0)

    def clipped(
        self, log_ratio: Tensor, advantages: Tensor, dual: Number | None = None, per_sequence: bool = False
    ) -> TokenTerms:
        """min(r A, clip(r) A), its derivative and what was clipped, from log r; A < 0 stops at r = e^dual."""
        low = log1p(-self.clip_low) if self.clip_low < 1 else -math.inf
        high = log1p(self.clip_high)
        good, bad = advantages > 0, advantages < 0
        clipped_high, clipped_low = good & (log_ratio > high), bad & (log_ratio < low)
        dual_clipped = None if dual is None else bad & (log_ratio > dual)
        flat = clipped_high | clipped_low if dual_clipped is None else clipped_high | clipped_low | dual_clipped
        # A bound acts on the side of its sign alone: above for A > 0, below (and at the dual bound) for A < 0.
        bounded = torch.where(good, clamped(log_ratio, high=high), clamped(log_ratio, low, dual))
        values = times(exp_or_drop(bounded), advantages)
        metrics = {"clip_fraction": flat, "clip_low_fraction": clipped_low, "clip_high_fraction": clipped_high}
        if dual_clipped is not None:
            metrics["dual_clip_fraction"] = dual_clipped
        return TokenTerms(torch.where(flat, 0.0, values), values, metrics, per_sequence)


@dataclass(frozen=True, kw_only=True)
class PPOClip(ClippedObjective):
    """PPO's clipped surrogate, as GRPO, DAPO, Dr.GRPO and BNPO use it: they differ in `aggregation` and the bounds.

    Token objective min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi/pi_prox (PPO, arXiv 1707.06347, eq. 7); with
    dual_clip, r of A < 0 stops at it (dual-clip PPO, arXiv 1912.09729; INTELLECT-2's delta). Gradient r A grad logp where
    nothing is clipped, 0 elsewhere. `OBJECTIVES` has the variants: "grpo" (arXiv 2402.03300) seq-mean-token-mean, "dapo"
    (arXiv 2503.14476) token-mean with clip_high 0.28, "dr_grpo" (arXiv 2503.20783) seq-mean-token-sum-norm, "bnpo" token-mean
    of each batch by itself. Without dual_clip, a ratio of e^80 and more with A < 0 is dropped and counted.

    Hyperparameters:
        clip_low, clip_high: the bounds' distances from 1; clip_low >= 1: no lower bound.
        dual_clip: > 1 + clip_high. None: no such bound.

    Metrics: clip_fraction, clip_low_fraction, clip_high_fraction, dual_clip_fraction.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 2, 4, requires_grad=True), torch.zeros(2, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.1, 0.5], [0.1, 0.5]])  # ratios 1.105 and 1.649
    >>> seg = vk.Segments.padded(torch.ones(2, 2))
    >>> out = objectives.ppo_clip(stats, mu, torch.tensor([1.0, -1.0]), seg)
    >>> out.coefficients  # A > 0 is clipped above, A < 0 is not
    tensor([[ 0.2763,  0.0000],
            [-0.2763, -0.4122]])
    """

    name: ClassVar[str] = "ppo_clip"

    dual_clip: float | None = None

    def checked(self, check: Check) -> dict[str, Any]:
        clips = super().checked(check)
        dual, highest = check.optional_positive_float("dual_clip", self.dual_clip), 1 + clips["clip_high"]
        if dual is not None and dual <= highest:  # trainers disagree on what it means there
            raise check.value_error(
                f"dual_clip must be > 1 + clip_high = {highest:g}, got {self.dual_clip!r}. Usual values are 3 to 10."
            )
        return {**clips, "dual_clip": dual}

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        dual = None if self.dual_clip is None else log(self.dual_clip)
        return self.clipped(tokens.log_ratio, tokens.advantages, dual)


@dataclass(frozen=True, kw_only=True)
class CISPO(TokenObjective):
    """CISPO: the clipped ratio as a constant weight before log pi, so that no token loses its gradient.

    Token objective sg[clip(r, min_ratio, max_ratio)] A log pi (MiniMax-M1, arXiv 2506.13585, eqs. 4 and 5), r = pi/pi_prox.
    max_ratio is 1 + eps_high of the paper; TRL's epsilon_high with loss_type "cispo" (5.0 after ScaleRL, arXiv 2510.13786);
    verl clips below as well, min_ratio = 1 - clip_ratio_low.

    Hyperparameters:
        min_ratio, max_ratio: None: no bound on that side (then e^80 and more is dropped and counted).

    Metrics: clip_fraction.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])
    >>> objectives.cispo(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 2.5000]])
    """

    name: ClassVar[str] = "cispo"

    min_ratio: float | None = None
    max_ratio: float | None = 5.0
    aggregation: str = "token-mean"

    def checked(self, check: Check) -> dict[str, Any]:
        return check_bounds(check, "min_ratio", self.min_ratio, "max_ratio", self.max_ratio)

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        bounds = Correction("truncate", "token", self.min_ratio, self.max_ratio)
        weights, outside = corrected_weights(tokens, tokens.log_ratio, bounds)
        return TokenTerms(times(weights, tokens.advantages), metrics={"clip_fraction": outside})
