"""REINFORCE and the importance weights in front of it: truncated, masked (MIS), by token or by sequence; TOPR.

Layer: tokens [N]. All have the form sg[w] A log pi. A baseline does not show here: it is in the advantages (`advantages.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.scalars import Number, clamped, log
from vcpo_kernels.objectives.build import TokenTerms
from vcpo_kernels.objectives.correction import Correction, check_bounds, corrected_weights
from vcpo_kernels.objectives.token_objective import TokenObjective
from vcpo_kernels.objectives.tokens import TokenBatch, require_sequence_advantages, times


@dataclass(frozen=True, kw_only=True)
class Reinforce(TokenObjective):
    """The policy gradient without a correction: token objective A log pi (Williams, 1992).

    behavior_logp is looked at for ESS and metrics alone. With `leave_one_out` advantages and "seq-mean-token-sum" it is RLOO
    (arXiv 2402.14740).

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> seg = vk.Segments.padded(torch.ones(1, 2))
    >>> objectives.reinforce(stats, stats.logp.detach(), torch.tensor([1.0]), seg).coefficients
    tensor([[0.5000, 0.5000]])
    """

    name: ClassVar[str] = "reinforce"
    proximal_terms: ClassVar[tuple[str, ...]] = ()

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        return TokenTerms(tokens.advantages, uses_ratio=False)


@dataclass(frozen=True, kw_only=True)
class WeightedObjective(TokenObjective):
    """sg[w] A log pi with w of pi/mu, bounded. weighting: mode and level of the `Correction` that does it."""

    weighting: ClassVar[tuple[str, str]]
    proximal_terms: ClassVar[tuple[str, ...]] = ()

    max_weight: float | None = 2.0
    min_weight: float | None = None

    def checked(self, check: Check) -> dict[str, Any]:
        return check_bounds(check, "min_weight", self.min_weight, "max_weight", self.max_weight)

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        mode, level = self.weighting
        bounds = Correction(mode, level, self.min_weight, self.max_weight)
        weights, outside = corrected_weights(tokens, tokens.log_weight, bounds)
        name = "truncated_fraction" if mode == "truncate" else "masked_fraction"
        return TokenTerms(
            times(weights, tokens.advantages),
            metrics={name: outside, "weight_mean": weights},
            per_sequence=level == "sequence",
        )


@dataclass(frozen=True, kw_only=True)
class TokenTruncatedIS(WeightedObjective):
    """Truncated importance sampling by token: sg[min(pi_t/mu_t, max_weight)] A log pi.

    Sources: TIS (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025), verl's
    rollout_is="token" (threshold 2.0), TRL's "token_truncate" (3.0).

    Hyperparameters:
        max_weight, min_weight: None: no bound on that side (without max_weight e^80 and more is dropped and counted).

    Metrics: truncated_fraction, weight_mean.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])
    >>> objectives.token_truncated_is(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 1.0000]])
    """

    name: ClassVar[str] = "token_truncated_is"
    weighting: ClassVar[tuple[str, str]] = ("truncate", "token")


@dataclass(frozen=True, kw_only=True)
class SequenceTruncatedIS(WeightedObjective):
    """Truncated importance sampling by sequence: sg[min(pi(y)/mu(y), max_weight)] A log pi, pi(y) the product over tokens.

    `vcpo_loss` without its baseline. Sources: VCPO (arXiv 2602.17616, 8.0), verl's rollout_is="sequence" (2.0), TRL's
    "sequence_truncate" (3.0). A sequence with one NaN or +inf log-ratio is dropped whole.

    Hyperparameters:
        max_weight, min_weight: None: no bound on that side (without max_weight e^80 and more is dropped and counted).

    Metrics: truncated_fraction, weight_mean (by token).

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])
    >>> objectives.sequence_truncated_is(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[4., 4.]])
    """

    name: ClassVar[str] = "sequence_truncated_is"
    weighting: ClassVar[tuple[str, str]] = ("truncate", "sequence")

    max_weight: float | None = 8.0


@dataclass(frozen=True, kw_only=True)
class TokenMaskedIS(WeightedObjective):
    """Masked importance sampling by token: sg[w_t 1(min_weight <= w_t <= max_weight)] A log pi, w_t = pi_t/mu_t.

    Sources: Liu et al., "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch" (2025);
    TRL's "token_mask". Masked tokens stay in the aggregation's counts (as in TRL; verl's rejection takes them out).

    Hyperparameters:
        max_weight, min_weight: None: no bound on that side (without max_weight e^80 and more is dropped and counted).

    Metrics: masked_fraction, weight_mean.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])
    >>> objectives.token_masked_is(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 0.0000]])
    """

    name: ClassVar[str] = "token_masked_is"
    weighting: ClassVar[tuple[str, str]] = ("mask", "token")


@dataclass(frozen=True, kw_only=True)
class SequenceMaskedIS(WeightedObjective):
    """Masked importance sampling by sequence (MIS): sg[w 1(min_weight <= w <= max_weight)] A log pi, w = pi(y)/mu(y).

    Sources: as `token_masked_is`; TRL's "sequence_mask" (3.0, its default). Masked sequences stay in the counts.

    Hyperparameters:
        max_weight, min_weight: None: no bound on that side (without max_weight e^80 and more is dropped and counted).

    Metrics: masked_fraction, weight_mean (by token).

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(2, 1, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0], [9.0]])
    >>> objectives.sequence_masked_is(stats, mu, torch.ones(2), vk.Segments.padded(torch.ones(2, 1))).coefficients
    tensor([[0.5000],
            [0.0000]])
    """

    name: ClassVar[str] = "sequence_masked_is"
    weighting: ClassVar[tuple[str, str]] = ("mask", "sequence")

    max_weight: float | None = 8.0


@dataclass(frozen=True, kw_only=True)
class TOPR(TokenObjective):
    """Tapered off-policy REINFORCE: sg[clip(w, a, b)] A log pi(y), with [a, b] by the sign of A, w = pi(y)/mu(y).

    TOPR, arXiv 2503.14286, its general form with a+ = b+ = 1, a- = 0, b- = 1: what was good is learned from as if it had been
    supervised, what was bad is unlearned only while the policy would still say it. The paper sums over tokens.
    Advantages are A_i [B], the paper's reward less its baseline.

    Hyperparameters:
        positive_range: [a+, b+] for A >= 0. negative_range: [a-, b-] for A < 0. Finite, >= 0, ascending.

    Metrics: truncated_fraction (w outside its range), weight_mean, by token.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(2, 1, dtype=torch.long))
    >>> mu = stats.logp.detach() + 9.0  # the policy has moved away from both
    >>> objectives.topr(stats, mu, torch.tensor([1.0, -1.0]), vk.Segments.padded(torch.ones(2, 1))).coefficients
    tensor([[ 5.0000e-01],
            [-6.1705e-05]])
    """

    name: ClassVar[str] = "topr"
    proximal_terms: ClassVar[tuple[str, ...]] = ()

    positive_range: tuple[float, float] = (1.0, 1.0)
    negative_range: tuple[float, float] = (0.0, 1.0)
    aggregation: str = "seq-mean-token-sum"

    def checked(self, check: Check) -> dict[str, Any]:
        return self.each(partial(_range, check), "positive_range", "negative_range")

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        require_sequence_advantages(self.check, tokens)
        log_w = tokens.sequence_sum(tokens.log_weight)
        good, bad = (clamped(log_w, _log(low), _log(high)) for low, high in (self.positive_range, self.negative_range))
        tapered = torch.where(tokens.advantages >= 0, good, bad)
        weights = tapered.exp()
        metrics = {"truncated_fraction": tapered != log_w, "weight_mean": weights}
        return TokenTerms(times(weights, tokens.advantages), metrics=metrics, per_sequence=True)


def _range(check: Check, name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise check.type_error(f"{name} must be a pair (low, high), got {bounds!r}.")
    low, high = (check.finite_float(f"{name}[{i}]", bound, minimum=0.0) for i, bound in enumerate(bounds))
    if low > high:
        raise check.value_error(f"{name} must ascend, got {bounds!r}.")
    return low, high


def _log(bound: float) -> Number:
    return log(bound) if bound > 0 else -math.inf
