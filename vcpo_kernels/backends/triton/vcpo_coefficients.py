"""vcpo_coefficients on Triton: three launches from tokens to coefficients, a fourth for the metrics.

(1) A program per sequence: L_i, |T_i|, n_i and whether it takes part. (2) One program: counts, ESS and the
metrics that need no group. (3) A program per group: baseline, standard deviation, advantages, coefficients.
(4) One program: the metrics that need the groups. Sequence-sized arithmetic is in float64 from L_i as it is
returned. Where groups come as ids, each program of (3) reads all B of them: B^2 / 32 warps' loads out of the
L2, 1 ms or less at B = 16384, and no atomic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton.group_advantages import INF, group_kernel, load64, log64
from vcpo_kernels.backends.triton.launch import FUSION, as_bytes, launches, on_device_of
from vcpo_kernels.backends.triton.segment_sum import segment_range, segment_tokens
from vcpo_kernels.sequences.log_weights import usable_below
from vcpo_kernels.sequences.vcpo_coefficients import METRICS, SequenceResults

# Positions in the metrics tensor (`vcpo_coefficients.METRICS`).
(
    _ESS,
    _ESS_RATIO,
    _NUM_SEQUENCES,
    _NUM_TOKENS,
    _NONFINITE,
    _TRUNCATED,
    _MEAN,
    _MAX,
    _REWARD,
    _ADVANTAGE,
    _EQUAL,
    _SINGLE,
    _RATIO_ABS,
    _RATIO_NEGATIVE,
) = (tl.constexpr(i) for i in range(14))


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "batch"])
def sequence_kernel(
    log_w_ptr,  # [B], as the next two
    lengths_ptr,
    norms_ptr,
    ok_ptr,  # [B] uint8
    ratios_ptr,  # [3, B] float64: of the finite log-ratios of its tokens, sum of magnitudes, how many are < 0, how many
    batch,
    advantages_ptr,  # [B], zeroed here, as the next: a sequence of no group is written by no group
    coefficients_ptr,
    logp_ptr,  # [N], as the next two
    behavior_ptr,
    scores_ptr,  # or None: then the norms are given
    score_norms_ptr,  # [B], or None
    rewards_ptr,  # [B]
    group_ids_ptr,  # [B] int64, or None
    num_groups,
    mask_ptr,  # [N] uint8, or None
    offsets_ptr,  # [B + 1] int64
    order_ptr,  # [N] int64, or None
    num_tokens,
    usable_below,  # L_i from which on a sequence is dropped
    SKIP_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    first, end = segment_range(offsets_ptr, sequence, num_tokens)
    if SKIP_FIRST:
        first += 1
    log_w = tl.zeros([BLOCK], dtype=tl.float64)
    length = tl.zeros([BLOCK], dtype=tl.int64)
    norm = tl.zeros([BLOCK], dtype=tl.float64)
    magnitude = tl.zeros([BLOCK], dtype=tl.float64)
    negative = tl.zeros([BLOCK], dtype=tl.int64)
    finite = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(first, end, BLOCK):
        token, counts = segment_tokens(start + tl.arange(0, BLOCK), end, mask_ptr, order_ptr)
        logp = tl.load(logp_ptr + token, mask=counts, other=0.0)
        ratio = logp - tl.load(behavior_ptr + token, mask=counts, other=0.0)
        log_w += ratio.to(tl.float64)
        within = counts & (tl.abs(ratio).to(tl.float32) < INF)
        magnitude += tl.where(within, tl.abs(ratio), 0.0).to(tl.float64)
        negative += (within & (ratio < 0.0)).to(tl.int64)
        finite += within.to(tl.int64)
        length += counts.to(tl.int64)
        if scores_ptr is not None:
            norm += tl.load(scores_ptr + token, mask=counts, other=0.0).to(tl.float64)
    dtype = log_w_ptr.dtype.element_ty
    total = tl.sum(log_w, axis=0).to(dtype)
    count = tl.sum(length, axis=0)
    squared_norm = tl.sum(norm, axis=0).to(dtype)
    if score_norms_ptr is not None:
        squared_norm = tl.load(score_norms_ptr + sequence)
    reward = tl.load(rewards_ptr + sequence).to(tl.float32)
    ok = (count > 0) & (total.to(tl.float32) < usable_below)
    ok = ok & (tl.abs(reward) < INF)
    ok = ok & (squared_norm >= 0.0) & (squared_norm.to(tl.float32) < INF)
    if group_ids_ptr is not None:
        group = tl.load(group_ids_ptr + sequence)
        ok = ok & (group >= 0) & (group < num_groups)
    tl.store(ratios_ptr + sequence, tl.sum(magnitude, axis=0))
    tl.store(ratios_ptr + batch + sequence, tl.sum(negative, axis=0).to(tl.float64))
    tl.store(ratios_ptr + 2 * batch + sequence, tl.sum(finite, axis=0).to(tl.float64))
    tl.store(log_w_ptr + sequence, total)
    tl.store(lengths_ptr + sequence, count.to(dtype))
    tl.store(norms_ptr + sequence, squared_norm)
    tl.store(ok_ptr + sequence, ok.to(tl.uint8))
    tl.store(advantages_ptr + sequence, 0.0)
    tl.store(coefficients_ptr + sequence, 0.0)


@triton.jit
def _log_sum(peak, total):
    return tl.where(total > 0.0, peak + tl.log(tl.where(total > 0.0, total, 1.0)), -INF)


@triton.jit(do_not_specialize=["batch"])
def batch_kernel(
    moments_ptr,  # [3] float64
    counts_ptr,  # [2] float64: B and sum|T| that the aggregation divides by
    metrics_ptr,  # [len(METRICS)]
    log_w_ptr,  # [B], as the next two
    lengths_ptr,
    rewards_ptr,
    ok_ptr,  # [B] uint8
    ratios_ptr,  # [3, B] float64
    batch,
    max_weight,
    ess_max_weight,
    num_sequences,  # negative: counted, as the next
    num_tokens,
    BLOCK: tl.constexpr,
):
    clip, ess_clip = log64(max_weight), log64(ess_max_weight)
    zeros = tl.zeros([BLOCK], dtype=tl.float64)
    nonempty_sum, token_sum, ok_sum, truncated_sum, log_w_sum, reward_sum = (
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
    )
    highest = zeros - INF
    for start in range(0, batch, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < batch
        ok = tl.load(ok_ptr + index, mask=inside, other=0) != 0
        log_w = load64(log_w_ptr, index, ok)
        lengths = load64(lengths_ptr, index, inside)
        nonempty_sum += (lengths > 0.0).to(tl.float64)
        token_sum += lengths
        ok_sum += ok.to(tl.float64)
        truncated_sum += (ok & (log_w > clip)).to(tl.float64)
        log_w_sum += log_w
        reward_sum += load64(rewards_ptr, index, ok)
        highest = tl.maximum(highest, tl.where(ok, log_w, -INF))
    nonempty, taking_part = tl.sum(nonempty_sum, axis=0), tl.sum(ok_sum, axis=0)
    peak = tl.max(highest, axis=0)
    ess_peak = tl.minimum(peak, ess_clip)

    first_sum, second_sum = zeros, zeros
    magnitude_sum, negative_sum, finite_sum = zeros, zeros, zeros
    for start in range(0, batch, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < batch
        magnitude_sum += load64(ratios_ptr, index, inside)
        negative_sum += load64(ratios_ptr + batch, index, inside)
        finite_sum += load64(ratios_ptr + 2 * batch, index, inside)
        ok = tl.load(ok_ptr + index, mask=inside, other=0) != 0
        log_w = tl.minimum(load64(log_w_ptr, index, ok), ess_clip)
        ok = ok & (log_w > -INF)
        e = tl.where(ok, tl.exp(tl.where(ok, log_w - ess_peak, 0.0)), 0.0)
        first_sum += e
        second_sum += e * e
    first = _log_sum(ess_peak, tl.sum(first_sum, axis=0))
    second = _log_sum(2 * ess_peak, tl.sum(second_sum, axis=0))
    ess = tl.where(first > -INF, tl.exp(tl.where(first > -INF, 2 * first - second, 0.0)), 0.0)
    ess = tl.minimum(ess, nonempty)
    tokens = tl.sum(token_sum, axis=0)
    divisor = tl.maximum(taking_part, 1.0)

    tl.store(moments_ptr, first)
    tl.store(moments_ptr + 1, second)
    tl.store(moments_ptr + 2, nonempty)
    tl.store(counts_ptr, tl.where(num_sequences < 0.0, nonempty, num_sequences))
    tl.store(counts_ptr + 1, tl.where(num_tokens < 0.0, tokens, num_tokens))
    dtype = metrics_ptr.dtype.element_ty
    tl.store(metrics_ptr + _ESS, ess.to(dtype))
    tl.store(metrics_ptr + _ESS_RATIO, (ess / tl.maximum(nonempty, 1.0)).to(dtype))
    tl.store(metrics_ptr + _NUM_SEQUENCES, nonempty.to(dtype))
    tl.store(metrics_ptr + _NUM_TOKENS, tokens.to(dtype))
    tl.store(metrics_ptr + _NONFINITE, (nonempty - taking_part).to(dtype))
    tl.store(metrics_ptr + _TRUNCATED, (tl.sum(truncated_sum, axis=0) / divisor).to(dtype))
    tl.store(metrics_ptr + _MEAN, (tl.sum(log_w_sum, axis=0) / divisor).to(dtype))
    tl.store(metrics_ptr + _MAX, tl.where(taking_part > 0.0, peak, 0.0).to(dtype))
    tl.store(metrics_ptr + _REWARD, (tl.sum(reward_sum, axis=0) / divisor).to(dtype))
    ratios = tl.maximum(tl.sum(finite_sum, axis=0), 1.0)
    tl.store(metrics_ptr + _RATIO_ABS, (tl.sum(magnitude_sum, axis=0) / ratios).to(dtype))
    tl.store(metrics_ptr + _RATIO_NEGATIVE, (tl.sum(negative_sum, axis=0) / ratios).to(dtype))


@triton.jit(do_not_specialize=["batch", "num_groups"])
def metrics_kernel(
    metrics_ptr,  # [len(METRICS)]
    ok_ptr,  # [B] uint8
    group_flags_ptr,  # [G] uint8
    group_squares_ptr,  # [G] float64
    batch,
    num_groups,
    BLOCK: tl.constexpr,
):
    zeros = tl.zeros([BLOCK], dtype=tl.float64)
    ok_sum, seen_sum, equal_sum, single_sum, square_sum = zeros, zeros, zeros, zeros, zeros
    for start in range(0, batch, BLOCK):
        index = start + tl.arange(0, BLOCK)
        ok_sum += tl.load(ok_ptr + index, mask=index < batch, other=0).to(tl.float64)
    for start in range(0, num_groups, BLOCK):
        index = start + tl.arange(0, BLOCK)
        flags = tl.load(group_flags_ptr + index, mask=index < num_groups, other=0)
        seen_sum += (flags > 0).to(tl.float64)
        equal_sum += (flags > 1).to(tl.float64)
        single_sum += (flags > 3).to(tl.float64)
        square_sum += load64(group_squares_ptr, index, index < num_groups)
    dtype = metrics_ptr.dtype.element_ty
    squares = tl.sum(square_sum, axis=0) / tl.maximum(tl.sum(ok_sum, axis=0), 1.0)
    equal_fraction = tl.sum(equal_sum, axis=0) / tl.maximum(tl.sum(seen_sum, axis=0), 1.0)
    tl.store(metrics_ptr + _ADVANTAGE, squares.to(dtype))
    tl.store(metrics_ptr + _EQUAL, equal_fraction.to(dtype))
    tl.store(metrics_ptr + _SINGLE, tl.sum(single_sum, axis=0).to(dtype))


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
    """See `vcpo_kernels.vcpo_coefficients`."""
    batch, device = rewards.shape[0], logp.device
    log_w, lengths, norms, advantages, coefficients = (
        torch.empty(batch, dtype=logp.dtype, device=device) for _ in range(5)
    )
    baselines, metrics = (torch.empty(n, dtype=logp.dtype, device=device) for n in (num_groups, len(METRICS)))
    moments, counts, group_squares, ratios = (
        torch.empty(n, dtype=torch.float64, device=device) for n in (3, 2, num_groups, 3 * batch)
    )
    ok, group_flags = (torch.empty(n, dtype=torch.uint8, device=device) for n in (batch, num_groups))
    logp, behavior_logp, rewards, offsets = (t.contiguous() for t in (logp, behavior_logp, rewards, offsets))
    token_scores, score_norms, group_ids, order = (
        t if t is None else t.contiguous() for t in (token_scores, score_norms, group_ids, order)
    )
    launch = launches(device).sequence
    options = {"BLOCK": launch.block, "num_warps": launch.num_warps, "enable_fp_fusion": FUSION}
    clip = math.inf if max_weight is None else float(max_weight)
    ess_clip = math.inf if ess_max_weight is None else float(ess_max_weight)
    with on_device_of(logp):
        if batch:
            sequence_kernel[(batch,)](
                log_w, lengths, norms, ok, ratios, batch, advantages, coefficients,
                logp, behavior_logp, token_scores if score_norms is None else None, score_norms, rewards,
                group_ids, num_groups, as_bytes(mask), offsets, order, logp.numel(), usable_below(max_weight),
                SKIP_FIRST=skip_first and order is None, **options,
            )  # fmt: skip
        batch_kernel[(1,)](
            moments, counts, metrics, log_w, lengths, rewards, ok, ratios, batch, clip, ess_clip,
            *(-1.0 if n is None else float(n) for n in (num_sequences, num_tokens)), **options,
        )  # fmt: skip
        if num_groups:
            group_kernel[(num_groups,)](
                baselines, group_flags, group_squares, advantages, coefficients,
                log_w, lengths, norms, rewards, ok, group_ids, counts, batch, group_size,
                clip, float(max_tokens or 1.0),
                WEIGHTING=baseline_weighting, AGGREGATION=aggregation, NORMALIZE=normalize_std, **options,
            )  # fmt: skip
        metrics_kernel[(1,)](metrics, ok, group_flags, group_squares, batch, num_groups, **options)
    return SequenceResults(log_w, lengths, moments, baselines, advantages, coefficients, metrics)
