"""VCPO's truncated sequence weights on advantages that the trainer has computed already.

Layer: tokens [N] -> sequences [B]. verl, prime-rl and slime hand a loss function log-probabilities and advantages, not rewards
and groups. What is left for VCPO's loss is one coefficient per token, w^_i A_t; each trainer applies its own aggregation k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.parallel.collectives import summed
from vcpo_kernels.sequences.behavior import log_ratio_metrics, warn_of_behavior
from vcpo_kernels.sequences.ess import ess_from_moments, ess_moments
from vcpo_kernels.sequences.log_weights import usable_below
from vcpo_kernels.sequences.segments import Segments, check_segments


@dataclass(frozen=True)
class WeightedAdvantages:
    """All detached. coefficients: w^_i A_t in the tokens' shape, 0 where masked out or dropped. log_weights: L_i [B].

    ess_moments: of the batch (`sequences.ess`). metrics: 0-d tensors.
    """

    coefficients: Tensor
    log_weights: Tensor
    ess_moments: Tensor
    metrics: dict[str, Tensor]

    def surrogate(self, logp: Tensor) -> Tensor:
        """-w^_i A_t per token, in logp's shape; its gradient with respect to logp_t is -w^_i A_t too (`vcpo_loss`'s value).

        logp is added and subtracted where a coefficient stands alone, so that NaN or inf elsewhere reaches nothing.
        """
        valid = self.coefficients != 0
        score = torch.where(valid, logp, 0.0)
        return -self.coefficients * (1 + score - score.detach())


def weighted_advantages(
    check: Check,
    logp: Tensor,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    max_weight: float | None,
    extra_log_weights: Tensor | None = None,
) -> WeightedAdvantages:
    """w^_i A_t of every token: w^_i = exp(min(L_i, log max_weight)), L_i = sum_t m_t (logp_t - mu_t) + extra_i.

    logp, behavior_logp, advantages: in the segments' shape; sequences that are split over ranks (`sequence_group`) are whole in
    what is taken of them, by one all-reduce; masked-out entries may hold anything. extra_log_weights [B]: what
    of log w_i is not in the difference of the two (a ratio that the trainer computed before). A sequence whose L_i is NaN or
    +inf, or one of whose advantages is not finite (an error on the CPU), is dropped, counted in metrics["nonfinite_sequences"]
    and stays in ESS's denominator.
    """
    check_segments(check, segments)
    max_weight = check.optional_positive_float("max_weight", max_weight)
    dtype = wide(logp.dtype)
    given_tensors = []
    for name, value in (("logp", logp), ("behavior_logp", behavior_logp), ("advantages", advantages)):
        check.tensor(name, value, checks.FLOAT_DTYPES)
        segments.flat(check, name, value)
        given_tensors.append(value.detach().to(dtype).reshape(logp.shape))
    theta, mu, given = given_tensors
    counts = segments.valid(theta.numel())
    if extra_log_weights is None:  # else the difference is from a proximal policy, which may well be this one
        warn_of_behavior(check.where, theta.reshape(-1), mu.reshape(-1), counts)
    of_rank = segments.of_this_rank()
    parts = (of_rank.lengths, of_rank.sum(theta - mu), of_rank.sum((~given.isfinite()).to(dtype)))
    # Summed in float64 whatever the dtype of the tokens; over sequence ranks at once.
    lengths, log_weights, broken = summed(torch.stack([p.double() for p in parts]), segments.sequence_group)
    valid, finite = lengths > 0, broken == 0
    if extra_log_weights is not None:
        log_weights = log_weights + torch.where(valid, extra_log_weights.detach().double(), 0.0)
    if checks.readable(given) and not bool(finite.all()):
        raise check.value_error(
            f"advantages must be finite at the tokens that count, got {int((~finite).sum())} sequences with NaN "
            "or inf. Look for a group without rewards, or for a division by a standard deviation of 0."
        )
    ok = valid & (log_weights < usable_below(max_weight)) & finite
    cap = math.inf if max_weight is None else math.log(max_weight)
    truncated = torch.where(ok, torch.exp(log_weights.clamp(max=cap)), 0.0)
    # Masked-out advantages and dropped sequences must not turn into 0 * inf.
    spread = segments.spread(truncated.to(dtype), like=theta)
    coefficients = torch.where(spread != 0, given, 0.0) * spread
    used = torch.where(ok, log_weights, -math.inf)
    moments = ess_moments(torch.where(finite, log_weights, math.nan), valid)
    count = ok.double().sum()
    metrics = {
        "ess_ratio": ess_from_moments(moments)[1],
        **log_ratio_metrics((theta - mu).reshape(-1), counts),
        "num_sequences": valid.double().sum(),
        "nonfinite_sequences": (valid & ~ok).double().sum(),
        "truncated_fraction": (ok & (log_weights > cap)).double().sum() / count.clamp(min=1),
        "log_weight_mean": torch.where(ok, log_weights, 0.0).sum() / count.clamp(min=1),
        "log_weight_max": torch.where(count > 0, torch.cat([used, used.new_full((1,), -math.inf)]).max(), 0.0),
    }
    return WeightedAdvantages(
        coefficients,
        log_weights.to(dtype),
        moments,
        {name: value.to(dtype) for name, value in metrics.items()},
    )
