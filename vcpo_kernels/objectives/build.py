"""objective_from_coefficients: from a method's rule for one token's coefficient to a loss with metrics and ESS.

Layer: tokens [N] -> scalars. A `TokenObjective`'s rule comes here, and so does a bare one. Here is what all have in common:
checks, aggregation, the extra terms, dropped tokens, ESS, metrics, and the step into autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.scalars import clamped, filled, log
from vcpo_kernels.objectives.common import CommonTerms, checked_terms
from vcpo_kernels.objectives.correction import Correction, corrected_weights
from vcpo_kernels.objectives.kl import ESTIMATORS
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.tokens import TokenBatch, like_logp, times, token_batch
from vcpo_kernels.rows.token_loss import token_loss
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.aggregation import aggregation_scale, longest_possible
from vcpo_kernels.sequences.behavior import log_ratio_metrics, warn_of_behavior
from vcpo_kernels.sequences.ess import ess_from_moments, ess_moments
from vcpo_kernels.sequences.log_weights import UNTRUNCATED_LIMIT
from vcpo_kernels.sequences.segments import Segments

if TYPE_CHECKING:
    from typing_extensions import Unpack

# In every output's metrics, beside what the method reports. Means are over the tokens in the loss.
METRICS = (
    "ess",
    "ess_ratio",
    "num_sequences",  # with at least one valid token
    "num_tokens",  # valid ones
    "nonfinite_tokens",  # dropped: a NaN, an infinite ratio, or an unbounded weight of e^80 and more
    "ratio_mean",  # of exp(log_ratio)
    "approx_kl",  # mean of -log pi/mu, the k1 estimate of KL(mu || pi)
    "log_ratio_abs_mean",  # of log pi/mu over valid tokens, as the next: what `sequences/behavior.py` reads
    "log_ratio_negative_fraction",
    "policy_loss",  # the loss without KL penalty and entropy bonus
)


@dataclass(frozen=True)
class TokenTerms:
    """What a rule makes of a TokenBatch, each [N]. Tokens that are not valid may hold anything.

    coefficients: a_t, the derivative of the token's objective (to be maximised) with respect to logp_t, before aggregation.
    values: the token's objective, for the reported loss. None: a_t logp_t, that of a constant weight before log pi.
    metrics: bool or float [N] by name, each reported as its mean over the tokens in the loss.
    per_sequence: the coefficient of one token depends on the ratios of its whole sequence, so that a NaN or infinite ratio
        drops all of it.
    uses_ratio: False for rules that look at no ratio, whose tokens then do not need a finite one.
    """

    coefficients: Tensor
    values: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    per_sequence: bool = False
    uses_ratio: bool = True


Rule = Callable[[TokenBatch], TokenTerms]


def objective_from_coefficients(
    name: str,
    rule: Rule,
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    aggregation: str = "seq-mean-token-mean",
    proximal_logp: Tensor | None = None,
    correction: Correction | None = None,
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """The loss whose gradient is -sum_t k_t a_t grad logp_t, for the a_t that `rule` gives: a `TokenObjective` of a bare rule.

    Args:
        name: what error messages call the objective.
        rule: TokenBatch -> TokenTerms.
        stats, behavior_logp, advantages, segments, aggregation: as of a `TokenObjective`, which says what all this gives.
        proximal_logp, correction, common: see `ObjectiveTerms`.

    Returns:
        ObjectiveOutput.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> def half_trust(tokens):  # the square root of the ratio as a constant weight
    ...     return objectives.TokenTerms(objectives.times((tokens.log_ratio / 2).exp(), tokens.advantages))
    >>> stats = vk.token_stats(torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 3, dtype=torch.long))
    >>> seg = vk.Segments.padded(torch.ones(2, 3))
    >>> out = objectives.objective_from_coefficients(
    ...     "half_trust", half_trust, stats, stats.logp.detach(), torch.tensor([1.0, -1.0]), seg)
    >>> out.coefficients
    tensor([[ 0.1667,  0.1667,  0.1667],
            [-0.1667, -0.1667, -0.1667]])
    >>> out.loss.backward()
    """
    return build_objective(
        Check(name), rule, stats, behavior_logp, advantages, segments, common,
        aggregation=aggregation, proximal_logp=proximal_logp, correction=correction,
    )  # fmt: skip


def build_objective(
    check: Check,
    rule: Rule,
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    common: Mapping[str, Any],
    *,
    aggregation: str,
    proximal_logp: Tensor | None = None,
    correction: Correction | None = None,
) -> ObjectiveOutput:
    """`objective_from_coefficients`, its common terms as a mapping: what a method does not take cannot slip through it."""
    terms = checked_terms(check, aggregation, common)
    tokens = token_batch(check, stats, behavior_logp, advantages, segments, proximal_logp)
    warn_of_behavior(check.where, tokens.logp, tokens.behavior_logp, tokens.valid)
    scale = _scale(check, aggregation, terms, tokens)
    policy = _policy(check, rule(tokens), tokens, correction, terms.get("token_weights"))
    value = (scale * policy.values).sum()
    total = _Total(-value, scale * policy.coefficients, None, {**_metrics(tokens, policy), "policy_loss": -value})
    if terms["kl_coefficient"]:
        total = _with_kl(check, total, scale, terms, tokens)
    entropy = segments.flat(check, "stats", stats.entropy)
    if terms["entropy_coefficient"]:
        total = _with_entropy(total, scale, terms["entropy_coefficient"], entropy.detach(), tokens)
    return _output(segments.flat(check, "stats", stats.logp), entropy, total, tokens, terms["ess_max_weight"], stats)


@dataclass(frozen=True)
class _Total:
    """The loss (0-d) and its negated derivatives [N], in float64, and what was measured on the way."""

    loss: Tensor
    coefficients: Tensor
    entropy_coefficients: Tensor | None
    metrics: dict[str, Tensor]


def _output(
    logp: Tensor, entropy: Tensor, total: _Total, tokens: TokenBatch, ess_max_weight: float | None, stats: TokenStats
) -> ObjectiveOutput:
    log_weights = tokens.segments.reduce(tokens.log_weight)
    clipped = log_weights
    if ess_max_weight is not None:  # +inf stays a broken weight, which a clamp would make an ordinary one
        truncated = clamped(log_weights, high=log(ess_max_weight))
        clipped = torch.where(log_weights < math.inf, truncated, math.nan)
    moments = ess_moments(clipped, tokens.lengths > 0)
    ess, ratio = ess_from_moments(moments)
    largest = torch.finfo(log_weights.dtype).max
    metrics = {"ess": ess, "ess_ratio": ratio, **total.metrics}
    metrics = {key: value.clamp(-largest, largest).to(log_weights.dtype) for key, value in metrics.items()}
    coefficients = total.coefficients.to(logp.dtype)
    to_entropy = None if total.entropy_coefficients is None else total.entropy_coefficients.to(entropy.dtype)
    return ObjectiveOutput(
        loss=token_loss(logp, entropy, coefficients, to_entropy, total.loss),
        coefficients=coefficients.view(stats.logp.shape),
        entropy_coefficients=None if to_entropy is None else to_entropy.view(stats.logp.shape),
        log_weights=log_weights,
        ess=metrics["ess"],
        ess_ratio=metrics["ess_ratio"],
        ess_moments=moments,
        metrics=metrics,
    )


@dataclass(frozen=True)
class _Policy:
    """The policy term of each token [N], in float64, 0 where the token is not in the loss."""

    coefficients: Tensor
    values: Tensor
    in_loss: Tensor
    metrics: dict[str, Tensor]


def _policy(
    check: Check, rule: TokenTerms, tokens: TokenBatch, correction: Correction | None, token_weights: Tensor | None
) -> _Policy:
    _check_rule(check, rule, tokens)
    a = rule.coefficients.detach().double()
    v = times(a, tokens.logp.double()) if rule.values is None else rule.values.detach().double()
    metrics = dict(rule.metrics)
    ok = tokens.valid
    if rule.uses_ratio:
        ok = ok & (tokens.log_ratio < math.inf)
    per_sequence = rule.per_sequence
    if correction is not None:
        if not isinstance(correction, Correction):
            raise check.type_error(
                f"correction must be a Correction, got {checks.describe(correction)}. "
                "Make one: objectives.Correction('truncate', 'token', maximum=2.0)."
            )
        if tokens.log_correction is None:
            raise check.value_error(
                "correction weighs by pi_prox/mu and needs proximal_logp. Without a proximal policy the method's "
                "own ratio is pi/mu already; leave correction=None."
            )
        weights, outside = corrected_weights(tokens, tokens.log_correction, correction)
        a, v = times(weights.double(), a), times(weights.double(), v)
        ok = ok & (tokens.log_correction < math.inf)
        per_sequence = per_sequence or correction.level == "sequence"
        metrics = {**metrics, "correction_mean": weights, "correction_outside_fraction": outside}
    if token_weights is not None:
        extra = _token_weights(check, token_weights, tokens).double()
        a, v = times(extra, a), times(extra, v)
    if per_sequence:
        ok = ok & ~tokens.any_of_sequence(~ok)
    largest = torch.finfo(tokens.logp.dtype).max  # beyond it the gradient would be inf in its own dtype
    ok = ok & (a.abs() <= largest) & (v.abs() <= largest)
    return _Policy(torch.where(ok, a, 0.0), torch.where(ok, v, 0.0), ok, metrics)


def _token_weights(check: Check, weights: Tensor, tokens: TokenBatch) -> Tensor:
    check.tensor("token_weights", weights, checks.FLOAT_DTYPES, "Convert it: token_weights.float().")
    if tuple(weights.shape) == (tokens.segments.num_sequences,):
        check.same_device("token_weights", weights, "stats", tokens.logp)
        return tokens.spread(weights.detach().to(tokens.logp.dtype))
    return torch.where(tokens.valid, like_logp(check, "token_weights", weights, tokens.segments, tokens.logp), 0.0)


def _check_rule(check: Check, rule: object, tokens: TokenBatch) -> None:
    if not isinstance(rule, TokenTerms):
        raise check.type_error(f"rule must return TokenTerms(coefficients, ...), got {checks.describe(rule)}.")
    named = {
        "coefficients": rule.coefficients,
        **({} if rule.values is None else {"values": rule.values}),
        **rule.metrics,
    }
    for name, value in named.items():
        check.tensor(f"the rule's {name}", value)
        check.shape(f"the rule's {name}", value, tokens.logp.shape, "one value per token, as tokens.logp")


def _with_kl(check: Check, total: _Total, scale: Tensor, terms: dict[str, Any], tokens: TokenBatch) -> _Total:
    """The loss with its KL penalty. A token whose KL or derivative reaches e^80 has none, and is counted."""
    reference = like_logp(check, "reference_logp", terms["reference_logp"], tokens.segments, tokens.logp)
    kl, slope = ESTIMATORS[terms["kl_estimator"]]((tokens.logp - reference).double())
    if terms["kl_importance_weighted"]:
        ratio = tokens.ratio.double()
        kl, slope = ratio * kl, ratio * (kl + slope)
    limit = math.exp(UNTRUNCATED_LIMIT)
    ok = tokens.valid & (kl.abs() < limit) & (slope.abs() < limit)
    kl, slope = torch.where(ok, kl, 0.0), torch.where(ok, slope, 0.0)
    factor = terms["kl_coefficient"] * scale
    measured = {
        "kl_mean": kl.sum() / ok.sum().clamp(min=1),
        "kl_nonfinite_tokens": (tokens.valid & ~ok).sum().double(),
    }
    return _Total(
        total.loss + (factor * kl).sum(),
        total.coefficients - factor * slope,
        total.entropy_coefficients,
        {**total.metrics, **measured},
    )


def _with_entropy(total: _Total, scale: Tensor, coefficient: float, entropy: Tensor, tokens: TokenBatch) -> _Total:
    held = torch.where(tokens.valid, entropy.double(), 0.0)
    return _Total(
        total.loss - coefficient * (scale * held).sum(),
        total.coefficients,
        coefficient * scale.double(),
        {**total.metrics, "entropy_mean": held.sum() / tokens.lengths.sum().clamp(min=1)},
    )


def _metrics(tokens: TokenBatch, policy: _Policy) -> dict[str, Tensor]:
    count = policy.in_loss.sum().clamp(min=1).double()

    def mean(values: Tensor) -> Tensor:
        return torch.where(policy.in_loss & values.isfinite(), values.double(), 0.0).sum() / count

    return {
        "num_sequences": (tokens.lengths > 0).sum().double(),
        "num_tokens": tokens.lengths.sum(),
        "nonfinite_tokens": (tokens.valid & ~policy.in_loss).sum().double(),
        "ratio_mean": mean(tokens.ratio),
        "approx_kl": mean(-tokens.log_weight),
        **log_ratio_metrics(tokens.log_weight, tokens.valid),
        **{key: mean(values.double()) for key, values in policy.metrics.items()},
    }


def _scale(check: Check, aggregation: str, terms: dict[str, Any], tokens: TokenBatch) -> Tensor:
    """k_t [N] float64, 0 where a token does not count."""
    given = terms["max_tokens"]
    max_tokens = longest_possible(check, aggregation, given, tokens.segments, "max_tokens", "Set max_tokens")
    lengths = tokens.lengths
    whole = (terms["num_sequences"], terms["num_tokens"])
    counted = ((lengths > 0).sum().double(), lengths.sum())
    totals = [c if w is None else filled(c, w) for w, c in zip(whole, counted, strict=True)]
    return tokens.spread(aggregation_scale(aggregation, lengths, totals[0], totals[1], max_tokens))
