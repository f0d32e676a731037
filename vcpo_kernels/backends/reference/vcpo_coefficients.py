"""The specification of vcpo_coefficients in eager torch, from the public formulas of sequences/."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vcpo_kernels.backends.reference import segment_sum
from vcpo_kernels.sequences import baselines
from vcpo_kernels.sequences.aggregation import aggregation_scale
from vcpo_kernels.sequences.ess import ess_from_moments, ess_moments
from vcpo_kernels.sequences.log_weights import usable, usable_below
from vcpo_kernels.sequences.segments import without_first
from vcpo_kernels.sequences.vcpo_coefficients import SequenceResults


def forward(
    logp: Tensor,  # [N], as behavior_logp, token_scores, mask, order
    behavior_logp: Tensor,
    token_scores: Tensor | None,
    score_norms: Tensor | None,  # [B], as rewards, group_ids
    rewards: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    num_groups: int,
    mask: Tensor | None,
    offsets: Tensor,  # [B + 1]
    order: Tensor | None,
    skip_first: bool,
    baseline_weighting: str,
    aggregation: str,
    normalize_std: bool,
    max_weight: float | None,
    ess_max_weight: float | None,
    num_sequences: float | None,
    num_tokens: float | None,
    max_tokens: float | None,
) -> SequenceResults:
    """See `vcpo_kernels.vcpo_coefficients`. Sequence-sized arithmetic in float64 from L_i as it is returned."""
    dtype, batch = logp.dtype, rewards.shape[0]
    if skip_first and order is None:
        mask = without_first(mask, offsets, logp.numel())

    def total(values: Tensor) -> Tensor:
        return segment_sum.forward(values, mask, offsets, order)

    log_w = total(logp - behavior_logp)
    lengths = total(torch.ones_like(logp, dtype=torch.float64))
    if score_norms is None:
        assert token_scores is not None
        score_norms = total(token_scores)
    norms = score_norms.double()
    nonempty = lengths > 0
    ok = (
        usable(log_w, nonempty)
        & (log_w < usable_below(max_weight))
        & rewards.isfinite()
        & (norms >= 0)
        & (norms < math.inf)
    )
    big_l = torch.where(ok, log_w.double(), -math.inf)
    clip = math.inf if max_weight is None else math.log(max_weight)
    clipped = big_l.clamp(max=clip)

    b_count = nonempty.sum().double() if num_sequences is None else norms.new_tensor(num_sequences)
    t_count = lengths.sum() if num_tokens is None else norms.new_tensor(num_tokens)
    scale = aggregation_scale(aggregation, lengths, b_count, t_count, max_tokens)

    ids = torch.arange(batch, device=logp.device) // group_size if group_ids is None else group_ids
    ok = ok & (ids >= 0) & (ids < num_groups)
    ids = ids.clamp(0, max(num_groups - 1, 0))
    terms = baselines.SequenceTerms(big_l, clipped, norms.log(), scale.log(), lengths.log())
    r = rewards.double()
    baseline, std, equal = baselines.group_baselines(
        r, baselines.WEIGHTINGS[baseline_weighting](terms), ok, ids, num_groups
    )
    advantages = r - baseline[ids]
    if normalize_std:
        advantages = advantages / torch.where(std > 1e-8, std, 1.0)[ids]
    advantages = torch.where(ok & ~equal[ids], advantages, 0.0)
    coefficients = torch.where(advantages != 0, scale * clipped.exp() * advantages, 0.0)

    ess_log_w = log_w if ess_max_weight is None else log_w.clamp(max=math.log(ess_max_weight))
    moments = ess_moments(torch.where(ok, ess_log_w.double(), math.nan), nonempty)
    ess, ratio = ess_from_moments(moments)
    metrics = torch.stack(
        [
            ess,
            ratio,
            nonempty.sum().double(),
            lengths.sum(),
            (nonempty & ~ok).sum().double(),
            *_sequence_metrics(ok, big_l, clip, r, advantages),
            *_group_metrics(ok, equal, ids, num_groups),
            *_log_ratio_metrics(logp - behavior_logp, total),
        ]
    )
    as_given = (t.to(dtype) for t in (baseline, advantages, coefficients, metrics))
    return SequenceResults(log_w, lengths.to(dtype), moments, *as_given)


def _sequence_metrics(ok: Tensor, log_w: Tensor, clip: float, rewards: Tensor, advantages: Tensor) -> list[Tensor]:
    """Of the sequences that take part (ok [B]): share truncated, mean and highest L_i, mean reward and squared advantage."""
    taking_part = ok.sum().clamp(min=1).double()
    highest = torch.where(ok, log_w, -math.inf).amax() if len(ok) else log_w.new_zeros(())
    return [
        (ok & (log_w > clip)).sum() / taking_part,
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


def _log_ratio_metrics(log_ratio: Tensor, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean magnitude of the finite log-ratios [N], and the share of them that is < 0. total: over each sequence's tokens."""
    finite = log_ratio.isfinite()
    count = total(finite.double()).sum().clamp(min=1)
    magnitude = total(torch.where(finite, log_ratio.abs(), 0.0).double()).sum()
    return magnitude / count, total((finite & (log_ratio < 0)).double()).sum() / count
