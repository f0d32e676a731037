"""REINFORCE and the importance weights in front of it: truncated, masked (MIS), by token or by sequence; TOPR.

Layer: tokens [N]. All have the form sg[w] A log pi. A baseline does not show here: it is in the advantages (`advantages.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.objectives.build import Rule, TokenTerms, build_objective
from vcpo_kernels.objectives.common import CommonTerms
from vcpo_kernels.objectives.correction import Correction, check_bounds, corrected_weights
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.tokens import TokenBatch, by_flag, times
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.segments import Segments

if TYPE_CHECKING:
    from typing_extensions import Unpack


def reinforce(
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    aggregation: str = "seq-mean-token-mean",
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """The policy gradient without a correction: token objective A log pi (Williams, 1992).

    behavior_logp is looked at for ESS and metrics alone. With `leave_one_out` advantages and "seq-mean-token-sum" it is RLOO
    (arXiv 2402.14740).

    Args:
        stats, behavior_logp, advantages, segments, aggregation, common: see `objective_from_coefficients`.

    Returns:
        ObjectiveOutput.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> seg = vk.Segments.padded(torch.ones(1, 2))
    >>> objectives.reinforce(stats, stats.logp.detach(), torch.tensor([1.0]), seg).coefficients
    tensor([[0.5000, 0.5000]])
    """
    return build_objective(
        Check("reinforce"), lambda tokens: TokenTerms(tokens.advantages, uses_ratio=False),
        stats, behavior_logp, advantages, segments, common, aggregation=aggregation,
    )  # fmt: skip


def _weighted(correction: Correction) -> Rule:
    """sg[w] A log pi with w of pi/mu."""
    name = "truncated_fraction" if correction.mode == "truncate" else "masked_fraction"

    def rule(tokens: TokenBatch) -> TokenTerms:
        weights, outside = corrected_weights(tokens, tokens.log_weight, correction)
        return TokenTerms(
            times(weights, tokens.advantages),
            metrics={name: outside, "weight_mean": weights},
            per_sequence=correction.level == "sequence",
        )

    return rule


def token_truncated_is(
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    max_weight: float | None = 2.0,
    min_weight: float | None = None,
    aggregation: str = "seq-mean-token-mean",
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """Truncated importance sampling by token: sg[min(pi_t/mu_t, max_weight)] A log pi.

    Sources: TIS (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025), verl's
    rollout_is="token" (threshold 2.0), TRL's "token_truncate" (3.0).

    Args:
        stats, behavior_logp, advantages, segments, aggregation, common: see `objective_from_coefficients`.
        max_weight, min_weight: None: no bound on that side (without max_weight e^80 and more is dropped and counted).

    Returns:
        ObjectiveOutput; metrics truncated_fraction, weight_mean.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])
    >>> objectives.token_truncated_is(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 1.0000]])
    """
    check = Check("token_truncated_is")
    rule = _weighted(_bounds(check, "truncate", "token", min_weight, max_weight))
    return build_objective(
        check,
        rule,
        stats,
        behavior_logp,
        advantages,
        segments,
        common,
        aggregation=aggregation,
    )


def sequence_truncated_is(
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    max_weight: float | None = 8.0,
    min_weight: float | None = None,
    aggregation: str = "seq-mean-token-mean",
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """Truncated importance sampling by sequence: sg[min(pi(y)/mu(y), max_weight)] A log pi, pi(y) the product over tokens.

    `vcpo_loss` without its baseline. Sources: VCPO (arXiv 2602.17616, 8.0), verl's rollout_is="sequence" (2.0), TRL's
    "sequence_truncate" (3.0). A sequence with one NaN or +inf log-ratio is dropped whole.

    Args:
        stats, behavior_logp, advantages, segments, aggregation, common: see `objective_from_coefficients`.
        max_weight, min_weight: None: no bound on that side (without max_weight e^80 and more is dropped and counted).

    Returns:
        ObjectiveOutput; metrics truncated_fraction, weight_mean (by token).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])
    >>> objectives.sequence_truncated_is(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[4., 4.]])
    """
    check = Check("sequence_truncated_is")
    rule = _weighted(_bounds(check, "truncate", "sequence", min_weight, max_weight))
    return build_objective(
        check,
        rule,
        stats,
        behavior_logp,
        advantages,
        segments,
        common,
        aggregation=aggregation,
    )


def token_masked_is(
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    max_weight: float | None = 2.0,
    min_weight: float | None = None,
    aggregation: str = "seq-mean-token-mean",
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """Masked importance sampling by token: sg[w_t 1(min_weight <= w_t <= max_weight)] A log pi, w_t = pi_t/mu_t.

    Sources: Liu et al., "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch" (2025);
    TRL's "token_mask". Masked tokens stay in the aggregation's counts (as in TRL; verl's rejection takes them out).

    Args:
        stats, behavior_logp, advantages, segments, aggregation, common: see `objective_from_coefficients`.
        max_weight, min_weight: None: no bound on that side (without max_weight e^80 and more is dropped and counted).

    Returns:
        ObjectiveOutput; metrics masked_fraction, weight_mean.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 9.0]])
    >>> objectives.token_masked_is(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 0.0000]])
    """
    check = Check("token_masked_is")
    rule = _weighted(_bounds(check, "mask", "token", min_weight, max_weight))
    return build_objective(
        check,
        rule,
        stats,
        behavior_logp,
        advantages,
        segments,
        common,
        aggregation=aggregation,
    )


def sequence_masked_is(
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    max_weight: float | None = 8.0,
    min_weight: float | None = None,
    aggregation: str = "seq-mean-token-mean",
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """Masked importance sampling by sequence (MIS): sg[w 1(min_weight <= w <= max_weight)] A log pi, w = pi(y)/mu(y).

    Sources: as `token_masked_is`; TRL's "sequence_mask" (3.0, its default). Masked sequences stay in the counts.

    Args:
        stats, behavior_logp, advantages, segments, aggregation, common: see `objective_from_coefficients`.
        max_weight, min_weight: None: no bound on that side (without max_weight e^80 and more is dropped and counted).

    Returns:
        ObjectiveOutput; metrics masked_fraction, weight_mean (by token).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(2, 1, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0], [9.0]])
    >>> objectives.sequence_masked_is(stats, mu, torch.ones(2), vk.Segments.padded(torch.ones(2, 1))).coefficients
    tensor([[0.5000],
            [0.0000]])
    """
    check = Check("sequence_masked_is")
    rule = _weighted(_bounds(check, "mask", "sequence", min_weight, max_weight))
    return build_objective(
        check,
        rule,
        stats,
        behavior_logp,
        advantages,
        segments,
        common,
        aggregation=aggregation,
    )


def _bounds(check: Check, mode: str, level: str, low: float | None, high: float | None) -> Correction:
    check_bounds(check, "min_weight", low, "max_weight", high)
    return Correction(mode, level, low, high)


def topr(
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    positive_range: tuple[float, float] = (1.0, 1.0),
    negative_range: tuple[float, float] = (0.0, 1.0),
    aggregation: str = "seq-mean-token-sum",
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """Tapered off-policy REINFORCE: sg[clip(w, a, b)] A log pi(y), with [a, b] by the sign of A, w = pi(y)/mu(y).

    TOPR, arXiv 2503.14286, its general form with a+ = b+ = 1, a- = 0, b- = 1: what was good is learned from as if it had been
    supervised, what was bad is unlearned only while the policy would still say it. The paper sums over tokens.

    Args:
        stats, behavior_logp, segments, aggregation, common: see `objective_from_coefficients`.
        advantages: A_i [B]; the paper's reward less its baseline.
        positive_range: [a+, b+] for A >= 0. negative_range: [a-, b-] for A < 0. Finite, >= 0, ascending.

    Returns:
        ObjectiveOutput; metrics truncated_fraction (w outside its range), weight_mean, by token.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(2, 1, dtype=torch.long))
    >>> mu = stats.logp.detach() + 9.0  # the policy has moved away from both
    >>> objectives.topr(stats, mu, torch.tensor([1.0, -1.0]), vk.Segments.padded(torch.ones(2, 1))).coefficients
    tensor([[ 5.0000e-01],
            [-6.1705e-05]])
    """
    check = Check("topr")
    positive = _log_range(check, "positive_range", positive_range)
    negative = _log_range(check, "negative_range", negative_range)

    def rule(tokens: TokenBatch) -> TokenTerms:
        require_sequence_advantages(check, tokens)
        log_w = tokens.sequence_sum(tokens.log_weight)
        good = tokens.advantages >= 0
        low = by_flag(good, positive[0], negative[0], log_w)
        high = by_flag(good, positive[1], negative[1], log_w)
        weights = log_w.clamp(low, high).exp()
        metrics = {"truncated_fraction": (log_w < low) | (log_w > high), "weight_mean": weights}
        return TokenTerms(times(weights, tokens.advantages), metrics=metrics, per_sequence=True)

    return build_objective(
        check,
        rule,
        stats,
        behavior_logp,
        advantages,
        segments,
        common,
        aggregation=aggregation,
    )


def _log_range(check: Check, name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise check.type_error(f"{name} must be a pair (low, high), got {bounds!r}.")
    low, high = (check.finite_float(f"{name}[{i}]", bound, minimum=0.0) for i, bound in enumerate(bounds))
    if low > high:
        raise check.value_error(f"{name} must ascend, got {bounds!r}.")
    return tuple(math.log(bound) if bound > 0 else -math.inf for bound in (low, high))  # type: ignore[return-value]


def require_sequence_advantages(check: Check, tokens: TokenBatch, instead: str = "") -> None:
    """Raise for advantages by token where the method knows only one per sequence."""
    if not tokens.sequence_advantages:
        raise check.value_error(
            f"advantages must be [{tokens.segments.num_sequences}], one per sequence: the method weighs whole "
            f"sequences. {instead}".rstrip()
        )
