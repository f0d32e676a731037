"""objective_from_coefficients: from a method's rule for one token's coefficient to a loss with metrics and ESS.

Layer: tokens [N] -> scalars. A `TokenObjective`'s rule comes here, and so does a bare one. Here is what all have in common:
checks, aggregation, the extra terms, dropped tokens, ESS, metrics, and the step into autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import detached, in_dtype
from vcpo_kernels.objectives.common import CommonTerms, checked_terms
from vcpo_kernels.objectives.correction import Correction, corrected_weights
from vcpo_kernels.objectives.kl import ESTIMATORS
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.step_sums import Aggregation, StepSums, step_sums
from vcpo_kernels.objectives.tokens import TokenBatch, like_logp, times, token_batch
from vcpo_kernels.rows.token_loss import token_loss
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.aggregation import longest_possible
from vcpo_kernels.sequences.behavior import log_ratio_means, log_ratio_values, warn_of_behavior
from vcpo_kernels.sequences.ess import ess_from_moments
from vcpo_kernels.sequences.log_weights import UNTRUNCATED_LIMIT
from vcpo_kernels.sequences.over_ranks import ranks_of
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
    ranks = ranks_of(check, terms["ranks"], segments)
    tokens = token_batch(check, stats, behavior_logp, advantages, segments, proximal_logp)
    warn_of_behavior(check.where, tokens.logp, tokens.behavior_logp, tokens.valid, tokens.log_weight)
    policy = _policy(check, rule(tokens), tokens, correction, terms.get("token_weights"))
    kl = _kl(check, terms, tokens) if terms["kl_coefficient"] else None
    entropy, held = stats.entropy, None
    if terms["entropy_coefficient"]:
        entropy = segments.flat(check, "stats", entropy)
        held = torch.where(tokens.valid, detached(entropy).double(), 0.0)

    max_tokens = longest_possible(check, aggregation, terms["max_tokens"], segments, "max_tokens", "Set max_tokens")
    summands = _summands(tokens, policy, kl, held)
    sums = step_sums(
        ranks, tokens, Aggregation(aggregation, terms["num_sequences"], terms["num_tokens"], max_tokens),
        terms["ess_max_weight"], summands.blocks(), policy.values,
    )  # fmt: skip
    scale = sums.scale
    loss, coefficients, to_entropy = sums.own_loss, scale * policy.coefficients, None
    if kl is not None:
        factor = terms["kl_coefficient"] * scale
        loss, coefficients = loss + (factor * kl.values).sum(), coefficients - factor * kl.slopes
    if held is not None:
        loss = loss - terms["entropy_coefficient"] * (scale * held).sum()
        to_entropy = (terms["entropy_coefficient"] * scale.double()).to(entropy.dtype)
    coefficients = coefficients.to(stats.logp.dtype).view(stats.logp.shape)
    share = 1 if ranks is None else ranks.loss_factor
    enters = (coefficients, to_entropy, loss)
    if share != 1:
        enters = (share * coefficients, None if to_entropy is None else share * to_entropy, share * loss)
    metrics = _metrics(sums, summands, tokens.logp.dtype)
    return ObjectiveOutput(
        loss=token_loss(stats.logp, entropy, *enters),
        coefficients=coefficients,
        entropy_coefficients=None if to_entropy is None else to_entropy.view(stats.logp.shape),
        log_weights=sums.log_weights,
        ess=metrics["ess"],
        ess_ratio=metrics["ess_ratio"],
        ess_moments=sums.moments,
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
    a = detached(rule.coefficients)
    v = times(a.double(), tokens.logp) if rule.values is None else detached(rule.values)
    terms = in_dtype(torch.stack([a, v]), torch.float64)
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
        terms = times(weights, terms)
        ok = ok & (tokens.log_correction < math.inf)
        per_sequence = per_sequence or correction.level == "sequence"
        metrics = {**metrics, "correction_mean": weights, "correction_outside_fraction": outside}
    if token_weights is not None:
        terms = times(_token_weights(check, token_weights, tokens), terms)
    if per_sequence:
        ok = ok & ~tokens.any_of_sequence(~ok)
    largest = torch.finfo(tokens.logp.dtype).max  # beyond it the gradient would be inf in its own dtype
    ok = ok & (torch.linalg.vector_norm(terms, math.inf, 0) <= largest)
    a, v = torch.where(ok, terms, 0.0).unbind()
    return _Policy(a, v, ok, metrics)


def _token_weights(check: Check, weights: Tensor, tokens: TokenBatch) -> Tensor:
    check.tensor("token_weights", weights, checks.FLOAT_DTYPES, "Convert it: token_weights.float().")
    if tuple(weights.shape) == (tokens.segments.num_sequences,):
        check.same_device("token_weights", weights, "stats", tokens.logp)
        return tokens.spread(detached(weights))
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


class _KL(NamedTuple):
    """The penalty of each token [N] and its derivative by logp, float64, 0 where not ok."""

    values: Tensor
    slopes: Tensor
    ok: Tensor


def _kl(check: Check, terms: dict[str, Any], tokens: TokenBatch) -> _KL:
    """A token whose KL or derivative reaches e^80 has none, and is counted."""
    reference = like_logp(check, "reference_logp", terms["reference_logp"], tokens.segments, tokens.logp)
    kl, slope = ESTIMATORS[terms["kl_estimator"]]((tokens.logp - reference).double())
    if terms["kl_importance_weighted"]:
        ratio = tokens.ratio.double()
        kl, slope = ratio * kl, ratio * (kl + slope)
    limit = math.exp(UNTRUNCATED_LIMIT)
    ok = tokens.valid & (kl.abs() < limit) & (slope.abs() < limit)
    return _KL(torch.where(ok, kl, 0.0), torch.where(ok, slope, 0.0), ok)


class _Summands(NamedTuple):
    """What metrics are made of once it is summed over the step's tokens, each [N], of any dtype.

    in_loss: tokens that are in it. averaged: counted where they are in the loss and finite. others: 0 where they do not count.
    """

    in_loss: Tensor
    averaged: dict[str, Tensor]
    others: dict[str, Tensor]

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Two [K, N]: averaged; in_loss and others."""
        finite = torch.stack(list(self.averaged.values())).nan_to_num(0.0, 0.0, 0.0)
        return torch.where(self.in_loss, finite, 0.0), torch.stack([self.in_loss, *self.others.values()])


def _summands(tokens: TokenBatch, policy: _Policy, kl: _KL | None, held: Tensor | None) -> _Summands:
    averaged = {"ratio_mean": tokens.ratio, "approx_kl": -tokens.log_weight, **policy.metrics}
    others = log_ratio_values(tokens.log_weight, tokens.valid)
    if kl is not None:
        others["kl_mean"], others["kl_tokens"] = kl.values, kl.ok
    if held is not None:
        others["entropy_mean"] = held
    return _Summands(policy.in_loss, averaged, others)


def _metrics(sums: StepSums, summands: _Summands, dtype: torch.dtype) -> dict[str, Tensor]:
    ess, ratio = ess_from_moments(sums.moments)
    averaged, others = sums.totals
    in_loss, *rest = others.unbind()
    totals = dict(zip(summands.others, rest, strict=True))
    means = (averaged / in_loss.clamp(min=1)).unbind()
    metrics = {
        "ess": ess,
        "ess_ratio": ratio,
        "num_sequences": sums.num_sequences,
        "num_tokens": sums.num_tokens,
        "nonfinite_tokens": sums.num_tokens - in_loss,
        **log_ratio_means(totals),
        **dict(zip(summands.averaged, means, strict=True)),
        "policy_loss": sums.loss,
    }
    if "kl_mean" in totals:
        metrics["kl_mean"] = totals["kl_mean"] / totals["kl_tokens"].clamp(min=1)
        metrics["kl_nonfinite_tokens"] = sums.num_tokens - totals["kl_tokens"]
    if "entropy_mean" in totals:
        metrics["entropy_mean"] = totals["entropy_mean"] / sums.num_tokens.clamp(min=1)
    largest = torch.finfo(dtype).max
    in_range = torch.stack(list(metrics.values())).clamp(-largest, largest)
    return dict(zip(metrics, in_dtype(in_range, dtype).unbind(), strict=True))
