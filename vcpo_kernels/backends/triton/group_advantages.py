"""The per-group kernel of vcpo_coefficients: one prompt group's baseline, advantages and coefficients.

Layer: sequences [B]. One program per group, three passes over its members in float64. The formulas are those
of `vcpo_kernels.baselines` (`WEIGHTINGS`, `group_baselines`) and of `vcpo_coefficients.aggregation_scale`.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))


@triton.jit
def load64(ptr, index, counts):
    """Sequence-sized values as float64, 0 where they do not count."""
    return tl.load(ptr + index, mask=counts, other=0.0).to(tl.float64)


@triton.jit
def log64(scalar):
    """log of a run-time number, in float64: log 8 in fp32 would move every truncated weight."""
    return tl.log(scalar + tl.zeros([], dtype=tl.float64))


@triton.jit
def _members(start, end, group, group_ids_ptr, ok_ptr, BLOCK: tl.constexpr):
    """Indices of a block of sequences, and which of them belong to the group and take part."""
    index = start + tl.arange(0, BLOCK)
    inside = index < end
    if group_ids_ptr is not None:
        inside = inside & (tl.load(group_ids_ptr + index, mask=inside, other=-1) == group)
    return index, inside & (tl.load(ok_ptr + index, mask=inside, other=0) != 0)


@triton.jit
def _scale(length, num_sequences, num_tokens, max_tokens, AGGREGATION: tl.constexpr):
    """k_i, for sequences with tokens."""
    divisor = tl.zeros_like(length) + tl.maximum(num_sequences, 1.0)
    if AGGREGATION == "seq-mean-token-mean":
        divisor = divisor * tl.maximum(length, 1.0)
    elif AGGREGATION == "seq-mean-token-sum-norm":
        divisor = divisor * max_tokens
    elif AGGREGATION == "token-mean":
        divisor = tl.zeros_like(length) + tl.maximum(num_tokens, 1.0)
    else:
        tl.static_assert(AGGREGATION == "seq-mean-token-sum")
    return 1.0 / divisor


@triton.jit
def _log_baseline_weight(log_w, clipped, norm, scale, length, ok, WEIGHTING: tl.constexpr):
    """log a_i of `baselines.WEIGHTINGS`; -inf where a sequence takes no part or its weight or norm is 0."""
    log_norm = tl.where(norm > 0.0, tl.log(tl.where(norm > 0.0, norm, 1.0)), -INF)
    if WEIGHTING == "paper":
        log_a = 2.0 * log_w + log_norm
    elif WEIGHTING == "estimator":
        log_a = 2.0 * (tl.log(scale) + clipped) + log_norm
    elif WEIGHTING == "official":
        log_a = 2.0 * clipped + 2.0 * log_w + log_norm
    elif WEIGHTING == "length":
        log_a = tl.log(tl.maximum(length, 1.0))
    else:
        tl.static_assert(WEIGHTING == "mean")
        log_a = tl.zeros_like(log_w)
    return tl.where(ok, log_a, -INF)


@triton.jit
def _member_weights(
    index,
    ok,
    log_w_ptr,
    lengths_ptr,
    norms_ptr,
    num_sequences,
    num_tokens,
    max_tokens,
    clip,
    WEIGHTING: tl.constexpr,
    AGGREGATION: tl.constexpr,
):
    """log a_i and k_i w^_i of a block of members."""
    length, log_w = load64(lengths_ptr, index, ok), load64(log_w_ptr, index, ok)
    clipped = tl.minimum(log_w, clip)
    scale = _scale(length, num_sequences, num_tokens, max_tokens, AGGREGATION)
    norm = load64(norms_ptr, index, ok)
    log_a = _log_baseline_weight(log_w, clipped, norm, scale, length, ok, WEIGHTING)
    return log_a, scale * tl.exp(clipped)


@triton.jit(do_not_specialize=["batch", "group_size"])
def group_kernel(
    baselines_ptr,  # [G]
    group_flags_ptr,  # [G] uint8: 1 has members, 3 and their rewards are all equal, 7 and there is one
    group_squares_ptr,  # [G] float64: sum of squared advantages
    advantages_ptr,  # [B], as are the next five
    coefficients_ptr,
    log_w_ptr,
    lengths_ptr,
    norms_ptr,
    rewards_ptr,
    ok_ptr,  # [B] uint8
    group_ids_ptr,  # [B] int64, or None: group_size consecutive sequences
    counts_ptr,  # [2] float64: B and sum|T| that the aggregation divides by
    batch,
    group_size,
    max_weight,
    max_tokens,
    WEIGHTING: tl.constexpr,
    AGGREGATION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    first = group * 0
    end = first + batch
    if group_ids_ptr is None:
        first = group * group_size
        end = tl.minimum(end, first + group_size)
    clip = log64(max_weight)
    num_sequences, num_tokens = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    zeros = tl.zeros([BLOCK], dtype=tl.float64)

    size_sum, reward_sum = zeros, zeros
    log_a_max, reward_max, reward_min = zeros - INF, zeros - INF, zeros + INF
    for start in range(first, end, BLOCK):
        index, ok = _members(start, end, group, group_ids_ptr, ok_ptr, BLOCK)
        reward = load64(rewards_ptr, index, ok)
        log_a, _ = _member_weights(
            index, ok, log_w_ptr, lengths_ptr, norms_ptr, num_sequences, num_tokens, max_tokens, clip,
            WEIGHTING, AGGREGATION,
        )  # fmt: skip
        size_sum += ok.to(tl.float64)
        reward_sum += reward
        log_a_max = tl.maximum(log_a_max, log_a)
        reward_max = tl.maximum(reward_max, tl.where(ok, reward, -INF))
        reward_min = tl.minimum(reward_min, tl.where(ok, reward, INF))
    size = tl.sum(size_sum, axis=0)
    # With ids the number of groups is often an upper bound: a group without members skips the other two
    # passes over B.
    end = tl.where(size > 0.0, end, first)
    mean = tl.sum(reward_sum, axis=0) / tl.where(size > 0.0, size, float("nan"))
    peak = tl.max(log_a_max, axis=0)
    spread = tl.max(reward_max, axis=0) - tl.min(reward_min, axis=0)  # of nothing: -inf

    a_sum, weighted_sum, deviation_sum = zeros, zeros, zeros
    for start in range(first, end, BLOCK):
        index, ok = _members(start, end, group, group_ids_ptr, ok_ptr, BLOCK)
        reward = load64(rewards_ptr, index, ok)
        log_a, _ = _member_weights(
            index, ok, log_w_ptr, lengths_ptr, norms_ptr, num_sequences, num_tokens, max_tokens, clip,
            WEIGHTING, AGGREGATION,
        )  # fmt: skip
        positive = log_a > -INF
        a = tl.where(positive, tl.exp(tl.where(positive, log_a - peak, 0.0)), 0.0)
        a_sum += a
        weighted_sum += a * reward
        deviation_sum += tl.where(ok, (reward - mean) * (reward - mean), 0.0)
    total = tl.sum(a_sum, axis=0)
    weighted = tl.sum(weighted_sum, axis=0) / tl.where(total > 0.0, total, 1.0)
    baseline = tl.where(total > 0.0, weighted, mean)
    divisor = tl.full([], 1.0, tl.float64)
    if NORMALIZE:
        std = tl.sqrt(tl.sum(deviation_sum, axis=0) / tl.maximum(size, 1.0))
        divisor = tl.where(std > 1e-8, std, 1.0)

    square_sum = zeros
    dtype = advantages_ptr.dtype.element_ty
    for start in range(first, end, BLOCK):
        index, ok = _members(start, end, group, group_ids_ptr, ok_ptr, BLOCK)
        _, weight = _member_weights(
            index, ok, log_w_ptr, lengths_ptr, norms_ptr, num_sequences, num_tokens, max_tokens, clip,
            WEIGHTING, AGGREGATION,
        )  # fmt: skip
        advantage = (load64(rewards_ptr, index, ok) - baseline) / divisor
        advantage = tl.where(tl.where(ok, spread, 0.0) > 0.0, advantage, 0.0)
        # Untruncated weights may be inf: where the advantage is 0, inf * 0 must not become NaN.
        coefficient = tl.where(advantage != 0.0, weight * advantage, 0.0)
        square_sum += advantage * advantage
        tl.store(advantages_ptr + index, advantage.to(dtype), mask=ok)
        tl.store(coefficients_ptr + index, coefficient.to(dtype), mask=ok)
    tl.store(baselines_ptr + group, baseline.to(dtype))
    equal = tl.where(size > 1.0, 3, 7)
    tl.store(group_flags_ptr + group, tl.where(size > 0.0, tl.where(spread > 0.0, 1, equal), 0).to(tl.uint8))
    tl.store(group_squares_ptr + group, tl.sum(square_sum, axis=0))
