"""What VCPO makes of a batch's sequences, from a few sums over the tokens of each.

Layer: sequences [B]. Eager torch in float64: the specification of the second half of the op `vcpo_coefficients`, and what many
ranks run on the sequences of a whole step, to the same bits on each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core.scalars import clamped, log
from vcpo_kernels.sequences import baselines
from vcpo_kernels.sequences.aggregation import step_scale
from vcpo_kernels.sequences.ess import ess_from_moments, ess_moments
from vcpo_kernels.sequences.log_weights import usable, usable_below
from vcpo_kernels.sequences.vcpo_coefficients import SequenceResults


class SequenceSums(NamedTuple):
    """Sums over the valid tokens of each sequence, [B] float64.

    log_weights: L_i. score_norms: n_i. lengths: |T_i|. And of the tokens' log-ratios that are finite: ratio_abs: magnitudes,
    ratio_negative: how many are < 0, ratio_count: how many there are.
    """

    log_weights: Tensor
    score_norms: Tensor
    lengths: Tensor
    ratio_abs: Tensor
    ratio_negative: Tensor
    ratio_count: Tensor


class Switches(NamedTuple):
    """VCPOConfig's, as the op takes them."""

    baseline_weighting: str
    aggregation: str
    normalize_std: bool
    max_weight: float | None
    ess_max_weight: float | None
    num_sequences: float | Tensor | None
    num_tokens: float | Tensor | None
    max_tokens: float | None


def sequence_results(
    sums: SequenceSums, rewards: Tensor, ids: Tensor, num_groups: int, switches: Switches, dtype: torch.dtype
) -> SequenceResults:
    """Every result of `vcpo_coefficients`, in `dtype`. rewards: [B] float64. ids: int64 [B], groups' numbers."""
    s, log_w, norms, lengths = switches, sums.log_weights, sums.score_norms, sums.lengths
    nonempty = lengths > 0
    ok = (
        usable(log_w, nonempty)
        & (log_w < usable_below(s.max_weight))
        & rewards.isfinite()
        & (norms >= 0)
        & (norms < math.inf)
    )
    big_l = torch.where(ok, log_w, -math.inf)
    clipped = big_l if s.max_weight is None else clamped(big_l, high=log(s.max_weight))

    scale = step_scale(s.aggregation, lengths, s.num_sequences, s.num_tokens, s.max_tokens)

    ok = ok & (ids >= 0) & (ids < num_groups)
    ids = ids.clamp(0, max(num_groups - 1, 0))
    terms = baselines.SequenceTerms(big_l, clipped, norms.log(), scale.log(), lengths.log())
    log_a = baselines.WEIGHTINGS[s.baseline_weighting](terms)
    baseline, std, equal = baselines.group_baselines(rewards, log_a, ok, ids, num_groups)
    advantages = rewards - baseline[ids]
    if s.normalize_std:
        advantages = advantages / torch.where(std > 1e-8, std, 1.0)[ids]
    advantages = torch.where(ok & ~equal[ids], advantages, 0.0)
    coefficients = torch.where(advantages != 0, scale * clipped.exp() * advantages, 0.0)

    ess_log_w = log_w if s.ess_max_weight is None else clamped(log_w, high=log(s.ess_max_weight))
    moments = ess_moments(torch.where(ok, ess_log_w, math.nan), nonempty)
    metrics = torch.stack(
        [
            *ess_from_moments(moments),
            nonempty.sum().double(),
            lengths.sum(),
            (nonempty & ~ok).sum().double(),
            *_sequence_metrics(ok, big_l, big_l > clipped, rewards, advantages),
            *_group_metrics(ok, equal, ids, num_groups),
            sums.ratio_abs.sum() / sums.ratio_count.sum().clamp(min=1),
            sums.ratio_negative.sum() / sums.ratio_count.sum().clamp(min=1),
        ]
    )
    as_given = (t.to(dtype) for t in (baseline, advantages, coefficients, metrics))
    return SequenceResults(log_w.to(dtype), lengths.to(dtype), moments, *as_given)


def _sequence_metrics(
    ok: Tensor, log_w: Tensor, truncated: Tensor, rewards: Tensor, advantages: Tensor
) -> list[Tensor]:
    """Of the sequences that take part (ok [B]): share truncated, mean and highest L_i, mean reward and squared advantage."""
    taking_part = ok.sum().clamp(min=1).double()
    highest = torch.where(ok, log_w, -math.inf).amax() if len(ok) else log_w.new_zeros(())
    return [
        (ok & truncated).sum() / taking_part,
        torch.where(ok, log_w, 0.0).sum() / taking_part,
        torch.where(ok.any(), highest, 0.0),
        torch.where(ok, rewards, 0.0).sum() / taking_part,
        advantages.square().sum() / taking_part,
    ]


def _group_metrics(ok: Tensor, equal: Tensor, ids: Tensor, num_groups: int) -> list[Tensor]:
    """Share of the groups seen whose rewards are all equal, and how many have one sequence. ok, equal, ids: [B]."""
    members = baselines.grouped("sum", ok.double(), ids, num_groups, 0.0)
    seen = members > 0
    return [(equal & seen).sum() / seen.sum().clamp(min=1).double(), (members == 1).sum().double()]
