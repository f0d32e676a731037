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
    warn_of_behavior(check.where, tokens.logp, tokens.behavior_logp, tokens.valid)
    policy = _policy(check, rule(tokens), tokens, correction, terms.get("token_weights"))
    kl = _kl(check, terms, tokens) if terms["kl_coefficient"] else None
    entropy = segments.flat(check, "stats", stats.entropy)
    held = torch.where(tokens.valid, entropy.detach().double(), 0.0) if terms["entropy_coefficient"] else None

    max_tokens = longest_possible(check, aggregation, terms["max_tokens"], segments, "max_tokens", "Set max_tokens")
    sums = step_sums(
        ranks, tokens, Aggregation(aggregation, terms["num_sequences"], terms["num_tokens"], max_tokens),
        terms["ess_max_weight"], _summands(tokens, policy, kl, held), {"policy": policy.values},
    )  # fmt: skip
    scale = sums.scale
    loss, coefficients, to_entropy = -(scale * policy.values).sum(), scale * policy.coefficients, None
    if kl is not None:
        factor = terms["kl_coefficient"] * scale
        loss, coefficients = loss + (factor * kl.values).sum(), coefficients - factor * kl.slopes
    if held is not None:
        loss = loss - terms["entropy_coefficient"] * (scale * held).sum()
        to_entropy = (terms["entropy_coefficient"] * scale.double()).to(entropy.dtype)
    logp = segments.flat(check, "stats", stats.logp)
    coefficients = coefficients.to(logp.dtype)
    share = 1 if ranks is None else ranks.loss_factor
    enters = (coefficients, to_entropy, loss)
    if share != 1:
        enters = (share * coefficients, None if to_entropy is None else share * to_entropy, share * loss)
    metrics = _metrics(sums, policy, kl is not None, held is not None)
    metrics = {key: _in_range(value, sums.log_weights.dtype) for key, value in metrics.items()}
    return ObjectiveOutput(
        loss=token_loss(logp, entropy, *enters),
        coefficients=coefficients.view(stats.logp.shape),
        entropy_coefficients=None if to_entropy is None else to_entropy.view(stats.logp.shape),
        log_weights=sums.log_weights,
        ess=metrics["ess"],
        ess_ratio=metrics["ess_ratio"],
        ess_moments=sums.moments,
        metrics=metrics,
    )


def _in_range(value: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return value.clamp(-largest, largest).to(dtype)


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


def _summands(tokens: TokenBatch, policy: _Policy, kl: _KL | None, held: Tensor | None) -> dict[str, Tensor]:
    """What metrics are made of once it is summed over the step's tokens, [N] float64."""

    def in_loss(values: Tensor) -> Tensor:
        return torch.where(policy.in_loss & values.isfinite(), values.double(), 0.0)

    summands = {
        "in_loss": policy.in_loss.double(),
        "nonfinite_tokens": (tokens.valid & ~policy.in_loss).double(),
        "ratio_mean": in_loss(tokens.ratio),
        "approx_kl": in_loss(-tokens.log_weight),
        **{f"method {key}": in_loss(values.double()) for key, values in policy.metrics.items()},
        **log_ratio_values(tokens.log_weight, tokens.valid),
    }
    if kl is not None:
        summands["kl_mean"], summands["kl_tokens"] = kl.values, kl.ok.double()
        summands["kl_nonfinite_tokens"] = (tokens.valid & ~kl.ok).double()
    if held is not None:
        summands["entropy_mean"] = held
    return summands


def _metrics(sums: StepSums, policy: _Policy, kl: bool, entropy: bool) -> dict[str, Tensor]:
    totals = sums.totals
    ess, ratio = ess_from_moments(sums.moments)
    count = totals["in_loss"].clamp(min=1)
    metrics = {
        "ess": ess,
        "ess_ratio": ratio,
        "num_sequences": sums.num_sequences,
        "num_tokens": sums.num_tokens,
        "nonfinite_tokens": totals["nonfinite_tokens"],
        "ratio_mean": totals["ratio_mean"] / count,
        "approx_kl": totals["approx_kl"] / count,
        **log_ratio_means(totals),
        **{key: totals[f"method {key}"] / count for key in policy.metrics},
        "policy_loss": -sums.scaled["policy"],
    }
    if kl:
        metrics["kl_mean"] = totals["kl_mean"] / totals["kl_tokens"].clamp(min=1)
        metrics["kl_nonfinite_tokens"] = totals["kl_nonfinite_tokens"]
    if entropy:
        metrics["entropy_mean"] = totals["entropy_mean"] / sums.num_tokens.clamp(min=1)
    return metrics
