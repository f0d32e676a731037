"""What the row kernels share: how a program finds its row and cuts it into blocks, and what it does with a block.

The block that holds the sampled token and the row's ragged end are left to a second, masked loop, so that the
first, which does nearly all of the work, compares no index and masks no load.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton import row_state
from vcpo_kernels.backends.triton.launch import access_elements

# Lengths and strides are run-time numbers: a new one, 1 and multiples of 16 included, never compiles a new
# kernel. That row starts are aligned is said by VEC, in whose units the strides come.
NOT_SPECIALIZED = [
    "inner",
    "vocabulary",
    "outer_stride",
    "inner_stride",
    "shift",
    "out_outer_stride",
    "out_inner_stride",
]


@triton.jit
def softcapped(z, softcap):
    """softcap * tanh(z / softcap) and its derivative, to 1e-7 and 3e-7 of themselves.

    tanh by a polynomial where 1 - 2 / (exp(2u) + 1) would cancel; the derivative (1 - tanh)(1 + tanh) from
    the small factor itself. No libdevice: its tanh is neither in the interpreter nor one instruction.
    """
    u = z * (1.0 / softcap)
    size = tl.abs(u)
    s = u * u
    p = 0.001762877218425274 * s - 0.007734463084489107
    p = p * s + 0.02152135595679283
    p = p * s - 0.05391799286007881
    p = p * s + 0.13333062827587128
    p = p * s - 0.3333333134651184
    complement = 2.0 / (tl.exp2(size * (2 * row_state.LOG2_E)) + 1.0)
    small = size < 0.8
    tanh = tl.where(small, size + size * s * p, 1.0 - complement)
    complement = tl.where(small, 1.0 - tanh, complement)
    capped = softcap * tl.where(u < 0.0, 0.0 - tanh, tanh)
    # A logit of -inf is a masked entry and stays one; its derivative is 0 either way.
    return tl.where(z == float("-inf"), z, capped), complement * (1.0 + tanh)


@triton.jit
def capped(z, softcap):
    if softcap is not None:
        z, _ = softcapped(z, softcap)
    return z


@triton.jit
def tile_offsets(VEC: tl.constexpr, VECTORS: tl.constexpr, LANES: tl.constexpr):
    """Offsets [vectors, lanes, VEC] in a block: a thread's VEC lie together, its warp's side by side."""
    vector = tl.arange(0, VECTORS)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (vector * LANES + lane) * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def token_of(row, inner, shift, mask_ptr):
    """Of logits row (o, i): o, i, where its token is in [O, I], and whether that token counts."""
    outer = row // inner
    position = row - outer * inner
    predicted = position + shift
    valid = predicted < inner
    token = outer.to(tl.int64) * inner + tl.where(valid, predicted, 0)
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + token) != 0)
    return outer.to(tl.int64), position.to(tl.int64), token, valid


@triton.jit
def split(vocabulary, target, BLOCK: tl.constexpr):
    """Full blocks, the one with the target, and how many blocks the plain loop and the masked loop take.

    target: in [0, vocabulary), or `vocabulary` where there is none.
    """
    full = vocabulary // BLOCK
    target_block = target // BLOCK
    in_full = (target_block < full).to(tl.int32)
    ragged = (full * BLOCK < vocabulary).to(tl.int32)
    return full, target_block, full - in_full, in_full + ragged


@triton.jit
def masked_block(j, full, target_block):
    """The block that the masked loop takes in turn j: the target's if it is full, then the ragged end."""
    return tl.where((j == 0) & (target_block < full), target_block, full)


@triton.jit
def target_of(token_id, vocabulary):
    """Whether an id lies in the row, and its index there: `vocabulary` where it does not."""
    known = (token_id >= 0) & (token_id < vocabulary)
    return known, tl.where(known, token_id, vocabulary).to(tl.int32)


@triton.jit
def row_lanes(
    row_ptr,
    target,
    vocabulary,
    temperature,
    softcap,  # or None
    tile,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The states of a row without its target, one per lane."""
    full, target_block, plain_blocks, masked_blocks = split(vocabulary, target, BLOCK)
    scale = row_state.LOG2_E / temperature

    reference, sum_exp, sum_centred, sum_sq = row_state.empty(LANES)
    for i in range(plain_blocks):
        block = i + (i >= target_block).to(tl.int32)
        z = capped(tl.load(row_ptr + block * BLOCK + tile).to(tl.float32), softcap)
        reference, sum_exp, sum_centred, sum_sq = row_state.absorb(reference, sum_exp, sum_centred, sum_sq, z, scale)
    for j in range(masked_blocks):
        index = masked_block(j, full, target_block) * BLOCK + tile
        counts = (index < vocabulary) & (index != target)
        z = capped(tl.load(row_ptr + index, mask=counts, other=0.0).to(tl.float32), softcap)
        z = tl.where(counts, z, float("-inf"))
        reference, sum_exp, sum_centred, sum_sq = row_state.absorb(reference, sum_exp, sum_centred, sum_sq, z, scale)

    return reference, sum_exp, sum_centred, sum_sq


@triton.jit
def row_statistics(
    row_ptr,
    known,
    target,
    vocabulary,
    temperature,
    softcap,  # or None
    tile,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """logp, entropy, score_sqnorm, lse of a row, and the pivot of its gradient."""
    reference, sum_exp, sum_centred, sum_sq = row_lanes(
        row_ptr, target, vocabulary, temperature, softcap, tile, BLOCK, LANES
    )
    scale = row_state.LOG2_E / temperature
    # Last, since through the loops it would hold a register; the masked one has just read around it.
    z_target = capped(tl.load(row_ptr + target, mask=known, other=float("-inf")).to(tl.float32), softcap)
    reference, sum_exp, sum_centred, sum_sq = row_state.merged(reference, sum_exp, sum_centred, sum_sq, scale)
    logp, entropy, score, lse, peak, log_total = row_state.statistics_of(
        reference, sum_exp, sum_centred, sum_sq, z_target, scale, temperature
    )
    nan = float("nan")
    return tl.where(known, logp, nan), entropy, tl.where(known, score, nan), lse, peak, log_total * temperature


@triton.jit
def store_statistics(logp_ptr, entropy_ptr, score_ptr, lse_ptr, token, logp, entropy, score, lse):
    tl.store(logp_ptr + token, logp)
    tl.store(entropy_ptr + token, entropy)
    tl.store(score_ptr + token, score)
    tl.store(lse_ptr + token, lse)


@triton.jit
def store_state(states_ptr, tokens, reference, sum_exp, sum_centred, sum_sq, target_logit):
    """A shard's five numbers of a token, `tokens` apart: rows/shard_states.py."""
    tl.store(states_ptr, reference)
    tl.store(states_ptr + tokens, sum_exp)
    tl.store(states_ptr + 2 * tokens, sum_centred)
    tl.store(states_ptr + 3 * tokens, sum_sq)
    tl.store(states_ptr + 4 * tokens, target_logit)


@triton.jit
def lost_digits(logp, lse):
    """Whether both were so large that p is good to 2e-6 no more. As in csrc/common/row_gradient.h."""
    return (tl.abs(logp) > 32.0) & (tl.abs(lse) > 32.0)


@triton.jit
def saved_pivot(z_target, logp, lse, temperature):
    """The pivot high, low of a row's gradient, from what was saved: z_v - high - low = temperature * log p_v.

    From the target's logit and logp or from lse, which say the same; the smaller of logp and lse was rounded less when it
    was saved. The difference z_target - temperature * logp goes on as an exact sum high + low (Knuth), since a rounded one
    is off by 1e-3 where lse is 1e4.
    """
    by_target = tl.abs(logp) <= tl.abs(lse)  # a logp of -inf or NaN: false
    minus_logp = 0.0 - logp * temperature
    total = z_target + minus_logp
    from_logp = total - z_target
    error = (z_target - (total - from_logp)) + (minus_logp - from_logp)
    return tl.where(by_target, total, lse * temperature), tl.where(by_target, error, 0.0)


@triton.jit
def gradient(
    z,  # [vectors, lanes, VEC] fp32, as stored
    high,
    low,
    scale,
    by_p,  # dx_v = p_v (by_p + by_p_log_p log2 p_v), temperature included
    by_p_log_p,  # None without a gradient to the entropy
    softcap,
):
    """d loss / d x_v / temperature where v is not the target, and the softcap's derivative (1 without)."""
    slope = 1.0
    if softcap is not None:
        z, slope = softcapped(z, softcap)
    log_p = ((z - high) - low) * scale
    p = tl.exp2(log_p)
    weight = by_p
    if by_p_log_p is not None:
        weight = by_p + tl.maximum(log_p, row_state.EXPONENT_FLOOR) * by_p_log_p
    return p * weight, slope


@triton.jit
def write_gradient(
    out_ptr,  # of the row, which `row_ptr` may be too
    row_ptr,
    target,
    at_target,  # dx where v is the target
    high,
    low,
    scale,
    by_p,  # dx elsewhere, as in `gradient`
    by_p_log_p,
    vocabulary,
    softcap,  # or None
    tile,
    BLOCK: tl.constexpr,
    LAST_FIRST: tl.constexpr,  # where the row has just been read: its end is what the caches hold most surely
):
    full, target_block, plain_blocks, masked_blocks = split(vocabulary, target, BLOCK)
    for i in range(plain_blocks):
        turn = plain_blocks - 1 - i if LAST_FIRST else i
        block = turn + (turn >= target_block).to(tl.int32)
        z = tl.load(row_ptr + block * BLOCK + tile).to(tl.float32)
        dx, slope = gradient(z, high, low, scale, by_p, by_p_log_p, softcap)
        tl.store(out_ptr + block * BLOCK + tile, (dx * slope).to(out_ptr.dtype.element_ty))
    for j in range(masked_blocks):
        index = masked_block(j, full, target_block) * BLOCK + tile
        inside = index < vocabulary
        z = tl.load(row_ptr + index, mask=inside, other=0.0).to(tl.float32)
        dx, slope = gradient(z, high, low, scale, by_p, by_p_log_p, softcap)
        dx = tl.where(index == target, at_target, dx) * slope
        tl.store(out_ptr + index, dx.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def zero_row(out_ptr, tile, vocabulary, BLOCK: tl.constexpr):
    zeros = (tile * 0).to(out_ptr.dtype.element_ty)
    full = vocabulary // BLOCK
    for block in range(full):
        tl.store(out_ptr + block * BLOCK + tile, zeros)
    if full * BLOCK < vocabulary:
        index = full * BLOCK + tile
        tl.store(out_ptr + index, zeros, mask=index < vocabulary)


def vectors_per_thread(vectors: int, rows: Tensor, vec: int) -> int:
    """Accesses per thread: as many elements whether rows are aligned or taken one element at a time."""
    return vectors * access_elements(rows) // vec
