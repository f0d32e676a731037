"""Objectives that leave out tokens or sequences which drifted too far: IcePop, OPSM, M2PO, DPPO-TV.

Layer: tokens [N]. What is left out stays in the aggregation's counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.scalars import clamped
from vcpo_kernels.objectives.build import TokenTerms
from vcpo_kernels.objectives.clipped import ClippedObjective, PPOClip
from vcpo_kernels.objectives.correction import Correction, check_bounds, log_or
from vcpo_kernels.objectives.token_objective import TokenObjective
from vcpo_kernels.objectives.tokens import TokenBatch, exp_or_drop, times
from vcpo_kernels.rows.token_stats import TokenStats, check_stats


def _left_out(terms: TokenTerms, masked: Tensor, per_sequence: bool) -> TokenTerms:
    return TokenTerms(
        coefficients=torch.where(masked, 0.0, terms.coefficients),
        values=None if terms.values is None else torch.where(masked, 0.0, terms.values),
        metrics={**terms.metrics, "masked_fraction": masked},
        per_sequence=per_sequence,
        uses_ratio=terms.uses_ratio,
    )


@dataclass(frozen=True, kw_only=True)
class IcePop(ClippedObjective):
    """IcePop: PPO's clip, times k 1(min_weight <= k <= max_weight) with k = pi_prox/mu of each token.

    Token objective M(k) min(r A, clip(r) A), r = pi/pi_prox (Ling team, "Small Leak Can Sink a Great Ship: Boost RL Training
    on MoE with IcePop", 2025, with [0.5, 5]; Ring-1T). k is the mismatch of the sampler and the trainer's own old policy.
    proximal_logp is the trainer's logp at the last update; without it, the policy as it is (one step per batch): r = 1 and
    k = pi/mu.

    Hyperparameters:
        min_weight, max_weight: the range of k that is trained on.
        clip_low, clip_high: as in `ppo_clip`.

    Metrics: as `ppo_clip`, correction_mean, correction_outside_fraction (the masked ones).

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])
    >>> objectives.icepop(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 0.0000]])
    """

    name: ClassVar[str] = "icepop"
    proximal_terms: ClassVar[tuple[str, ...]] = ("proximal_logp",)

    min_weight: float | None = 0.5
    max_weight: float | None = 5.0
    aggregation: str = "token-mean"

    def checked(self, check: Check) -> dict[str, Any]:
        bounds = check_bounds(check, "min_weight", self.min_weight, "max_weight", self.max_weight)
        return {**bounds, **super().checked(check)}

    def proximal(
        self, stats: TokenStats, logp: Tensor | None, correction: Correction | None
    ) -> tuple[Tensor, Correction]:
        check_stats(self.check, stats)
        mask = Correction("mask", "token", self.min_weight, self.max_weight)
        return stats.logp.detach() if logp is None else logp, mask

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        return self.clipped(tokens.log_ratio, tokens.advantages)


@dataclass(frozen=True, kw_only=True)
class OPSM(PPOClip):
    """Off-policy sequence masking: PPO's clip without the bad sequences (A < 0) that the policy has moved away from.

    A token is left out where A < 0 and mean_t(log mu - log pi) > threshold over its sequence (DeepSeek-V3.2, arXiv 2512.02556,
    eq. 9; TRL's off_policy_mask_threshold, of which its documentation names 0.5; slime's --opsm-delta, 1e-4). The mask is
    always against mu, whatever r is against.

    Hyperparameters:
        threshold: delta, in nats per token, >= 0.
        clip_low, clip_high, dual_clip: as in `ppo_clip`.

    Metrics: as `ppo_clip`, masked_fraction.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(2, 1, dtype=torch.long))
    >>> mu = stats.logp.detach() + torch.tensor([[0.6], [0.1]])
    >>> seg = vk.Segments.padded(torch.ones(2, 1))
    >>> objectives.opsm(stats, mu, -torch.ones(2), seg, clip_low=1.0).coefficients
    tensor([[ 0.0000],
            [-0.4524]])
    """

    name: ClassVar[str] = "opsm"

    threshold: float = 0.5

    def checked(self, check: Check) -> dict[str, Any]:
        return {**super().checked(check), **self.each(check.finite_float, "threshold", minimum=0.0)}

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        masked = (tokens.advantages < 0) & (tokens.sequence_mean(-tokens.log_weight) > self.threshold)
        return _left_out(super().rule(tokens), masked, per_sequence=True)


@dataclass(frozen=True, kw_only=True)
class M2PO(TokenObjective):
    """M2PO: r A without the tokens of largest (log r)^2, as many as it takes to bring their mean down to the threshold.

    Second-moment trust policy optimization (arXiv 2510.01161, Algorithm 1), r = pi/mu: among the trust-region tokens (A > 0
    and r > 1, or A < 0 and r < 1) the largest (log r)^2 are masked until the mean of the remaining is <= threshold; all others
    keep their gradient r A grad logp. AReaL takes the mean over all tokens (trust_region_only=False); the authors' code makes
    clip bounds of the same threshold, no tighter than 0.7 and 1.5. The mask is taken over the batch that this call sees: with
    micro-batches, over each by itself. Unmasked ratios of e^80 and more are dropped.

    Hyperparameters:
        threshold: tau_M2, > 0.
        trust_region_only: False: every valid token is in the mean and may be masked.

    Metrics: masked_fraction, second_moment (mean of (log r)^2 over all tokens in the loss).

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 3, 4, requires_grad=True), torch.zeros(1, 3, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.1, 2.0, -2.0]])
    >>> objectives.m2po(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 3))).coefficients
    tensor([[0.3684, 0.0000, 0.0451]])
    """

    name: ClassVar[str] = "m2po"
    proximal_terms: ClassVar[tuple[str, ...]] = ()
    of_one_rank: ClassVar[str] = "it sorts the tokens of the whole batch"

    threshold: float = 0.04
    trust_region_only: bool = True
    aggregation: str = "token-mean"

    def checked(self, check: Check) -> dict[str, Any]:
        return {**self.each(check.positive_float, "threshold"), **self.each(check.boolean, "trust_region_only")}

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        d, a = tokens.log_ratio, tokens.advantages
        second_moment = d.double().square()
        candidates = tokens.valid & (second_moment < math.inf)
        if self.trust_region_only:
            candidates = candidates & (((a > 0) & (d > 0)) | ((a < 0) & (d < 0)))
        # In ascending order the running mean never falls, so the tokens to keep are those up to its last value <= tau.
        ascending, order = torch.where(candidates, second_moment, math.inf).sort(stable=True)
        ranks = torch.arange(1, d.shape[0] + 1, device=d.device)
        kept = torch.zeros_like(candidates).scatter(0, order, ascending.cumsum(0) / ranks <= self.threshold)
        masked = candidates & ~kept
        values = torch.where(masked, 0.0, times(tokens.ratio, a))
        return TokenTerms(values, values, {"masked_fraction": masked, "second_moment": second_moment})


@dataclass(frozen=True, kw_only=True)
class DPPOTV(TokenObjective):
    """DPPO with the binary total-variation mask: a token is left out once its probability, not its ratio, has moved enough.

    Token objective sg[min(r, max_ratio)] A log pi, r = pi/mu, left out where A > 0 and pi - mu > divergence_high, or A <= 0 and
    pi - mu < -divergence_low (arXiv 2602.04879, Binary-TV; verl's "dppo_tv", whose clip_ratio_c = 20 is max_ratio; prime-rl's
    dppo_mask_low and dppo_mask_high, 0.2).

    Hyperparameters:
        divergence_low, divergence_high: in probability, >= 0.
        max_ratio: None: untruncated (then e^80 and more is dropped and counted).

    Metrics: masked_fraction, truncated_fraction.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = torch.tensor([[0.2, 0.04]]).log()  # pi = 0.25: moved by 0.05 and by 0.21
    >>> objectives.dppo_tv(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.6250, 0.0000]])
    """

    name: ClassVar[str] = "dppo_tv"
    proximal_terms: ClassVar[tuple[str, ...]] = ()

    divergence_low: float = 0.2
    divergence_high: float = 0.2
    max_ratio: float | None = 20.0
    aggregation: str = "token-mean"

    def checked(self, check: Check) -> dict[str, Any]:
        divergences = self.each(check.finite_float, "divergence_low", "divergence_high", minimum=0.0)
        return {**divergences, **self.each(check.optional_positive_float, "max_ratio")}

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        moved = tokens.logp.exp() - tokens.behavior_logp.exp()
        masked = torch.where(tokens.advantages > 0, moved > self.divergence_high, moved < -self.divergence_low)
        log_limit = log_or(self.max_ratio, math.inf)
        weights = exp_or_drop(clamped(tokens.log_ratio, high=log_limit))
        metrics = {"truncated_fraction": ~masked & (tokens.log_ratio > log_limit)}
        return _left_out(TokenTerms(times(weights, tokens.advantages), metrics=metrics), masked, per_sequence=False)
