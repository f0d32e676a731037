"""The mergeable row state: what a pass over any piece of a row of logits leaves, and the rule that merges it.

Layer: rows. The Triton twin of csrc/common/row_state.h, with its names; there exponents u = z scale are held, here
logits z (after softcap) and scale = log2(e) / temperature, so that exp(x_v - x_r) = exp2((z_v - reference) scale).
The state of a piece of a row, relative to `reference`:

    reference    max z_v                            -inf while nothing but -inf was seen
    sum_exp      sum_v e_v                          e_v = exp2(t_v), t_v = (z_v - reference) scale
    sum_centred  sum_v t_v e_v                      the entropy's numerator, in bits
    sum_sq       sum_v e_v^2                        the score norm's numerator

The sampled token is left out of a row's pieces and joins at the end: 1 - p_y is then a sum of positive terms.
States of pieces are merged by taking all relative to one reference (`rebased`) and adding; blocks of a row, lanes of
a program and vocabulary shards differ only in who holds the pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# exp2 of anything below is 0 in fp32. Exponents are held here before they multiply a zero, since -inf * 0 is
# NaN.
EXPONENT_FLOOR = tl.constexpr(-160.0)


@triton.jit
def finite(reference):
    """-inf - -inf is NaN; measured from 0 instead, a -inf logit has exp2(-inf) = 0 in an empty state too."""
    return tl.where(reference == float("-inf"), 0.0, reference)


@triton.jit
def rebased(reference, sum_exp, sum_centred, sum_sq, new_reference, scale):
    """The sums of a state, relative to new_reference >= reference."""
    by = tl.maximum((reference - finite(new_reference)) * scale, EXPONENT_FLOOR)
    factor = tl.exp2(by)
    return sum_exp * factor, (sum_centred + by * sum_exp) * factor, sum_sq * factor * factor


@triton.jit
def empty(LANES: tl.constexpr):
    """One state per lane, of no logits."""
    nothing = tl.zeros([LANES], dtype=tl.float32)
    return nothing + float("-inf"), nothing, nothing, nothing


@triton.jit
def absorb(
    reference,  # [lanes], as the three sums
    sum_exp,
    sum_centred,
    sum_sq,
    z,  # [vectors, lanes, vector] fp32
    scale,
):
    """Each lane's state with its own part of a block added.

    Axes 0 and 2 of the block lie within a thread, so that nothing here leaves registers: no shuffle and no
    barrier per block, one rescaling per lane and block. sm_90 SASS: 11.4 instructions per bf16 element, all
    told; 9 are the arithmetic below, 1.5 the conversion, and 1 because sums are taken as trees, where half
    the multiplies do not fuse.
    """
    new_reference = tl.maximum(reference, tl.max(tl.max(z, axis=2), axis=0))
    sum_exp, sum_centred, sum_sq = rebased(reference, sum_exp, sum_centred, sum_sq, new_reference, scale)
    t = (z - finite(new_reference)[None, :, None]) * scale
    e = tl.exp2(t)
    sum_exp += tl.sum(tl.sum(e, axis=2), axis=0)
    sum_centred += tl.sum(tl.sum(tl.maximum(t, EXPONENT_FLOOR) * e, axis=2), axis=0)
    sum_sq += tl.sum(tl.sum(e * e, axis=2), axis=0)
    return new_reference, sum_exp, sum_centred, sum_sq


@triton.jit
def merged(reference, sum_exp, sum_centred, sum_sq, scale):
    """All lanes' states merged into one, in an order that depends on nothing but the number of lanes."""
    new_reference = tl.max(reference, axis=0)
    sum_exp, sum_centred, sum_sq = rebased(reference, sum_exp, sum_centred, sum_sq, new_reference, scale)
    return new_reference, tl.sum(sum_exp, axis=0), tl.sum(sum_centred, axis=0), tl.sum(sum_sq, axis=0)


@triton.jit
def log1p(q):
    """log(1 + q) for q >= 0, to an ulp or two: the rounding of 1 + q is divided out again."""
    u = 1.0 + q
    rounded = u - 1.0
    return tl.where(rounded == 0.0, q, tl.log(u) * (q / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def expm1_of_log_probability(log_p):
    """exp(log_p) - 1 for log_p <= 0, free of cancellation (Kahan): exp's rounding is divided out again."""
    u = tl.exp(log_p)
    inside = (u > 0.0) & (u < 1.0)
    log_u = tl.log(tl.where(inside, u, 0.5))
    near_zero = tl.where(u < 1.0, -1.0, log_p)  # u == 1: expm1 = log_p to rounding; u == 0: -1; a NaN stays one
    return tl.where(inside, (u - 1.0) * (log_p / log_u), near_zero)


@triton.jit
def statistics_of(
    reference,  # state of the row without the target
    sum_exp,
    sum_centred,
    sum_sq,
    z_target,  # -inf where the row has no target
    scale,
    temperature,
):
    """logp, entropy, score_sqnorm and lse from a row's state and its target, NaN where every logit is -inf; and lse's two
    parts, peak / temperature + log_total, which at peak = 1e6 fp32 has no room for in one number.
    """
    new_reference = tl.maximum(reference, z_target)
    rest, rest_centred, rest_sq = rebased(reference, sum_exp, sum_centred, sum_sq, new_reference, scale)
    centred_target = z_target - finite(new_reference)
    e_target = tl.exp2(centred_target * scale)
    total = rest + e_target
    total = tl.where(total == 0.0, float("nan"), total)
    # A target above all the rest is the reference, with e_target = 1: log1p then keeps a p_y close to 1 exact.
    dominant = (e_target >= rest) & (total == total)
    log_total = tl.where(dominant, log1p(rest), tl.log(total))
    logp = tl.where(dominant, 0.0 - log_total, centred_target / temperature - log_total)
    p_target = e_target / total
    rest_entropy = (rest * log_total - LN_2 * rest_centred) / total  # both terms >= 0
    entropy = rest_entropy - tl.where(p_target > 0.0, p_target * logp, 0.0)
    p_rest = rest / total
    score_sqnorm = p_rest * p_rest + rest_sq / total / total
    peak = finite(new_reference)
    lse = peak / temperature + log_total
    return logp, entropy, score_sqnorm, lse, peak, log_total
