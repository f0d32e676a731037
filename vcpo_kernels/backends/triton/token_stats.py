"""token_stats on Triton: one program per row, one pass over it.

Forward: reads N V elements once and writes 16 bytes per row. Backward: reads once more, writes once. In sm_90
SASS the main loops take 11.4 instructions per bf16 element forward and 10.1 backward (with a gradient to the
entropy); an H100 issues about 19 in the time that 3 TB/s bring one. A softcap makes that 35
and 40, which is bound by arithmetic.

The block that holds the sampled token and the row's ragged end are left to a second, masked loop, so that the
first, which does nearly all of the work, compares no index and masks no load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton import row_state
from vcpo_kernels.backends.triton.launch import (
    FUSION,
    access_elements,
    as_bytes,
    launches,
    on_device_of,
    vector_length,
)

# Lengths and strides are run-time numbers: a new one, 1 and multiples of 16 included, never compiles a new
# kernel. That row starts are aligned is said by VEC, in whose units the strides come.
_NOT_SPECIALIZED = [
    "inner",
    "vocabulary",
    "outer_stride",
    "inner_stride",
    "shift",
    "out_outer_stride",
    "out_inner_stride",
]

_LN_2 = row_state.LN_2
_LOG2_E = row_state.LOG2_E


@triton.jit
def _softcapped(z, softcap):
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
    complement = 2.0 / (tl.exp2(size * (2 * _LOG2_E)) + 1.0)
    small = size < 0.8
    tanh = tl.where(small, size + size * s * p, 1.0 - complement)
    complement = tl.where(small, 1.0 - tanh, complement)
    capped = softcap * tl.where(u < 0.0, 0.0 - tanh, tanh)
    # A logit of -inf is a masked entry and stays one; its derivative is 0 either way.
    return tl.where(z == float("-inf"), z, capped), complement * (1.0 + tanh)


@triton.jit
def _capped(z, softcap):
    if softcap is not None:
        z, _ = _softcapped(z, softcap)
    return z


@triton.jit
def _tile(VEC: tl.constexpr, VECTORS: tl.constexpr, LANES: tl.constexpr):
    """Offsets [vectors, lanes, VEC] in a block: a thread's VEC lie together, its warp's side by side."""
    vector = tl.arange(0, VECTORS)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (vector * LANES + lane) * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def _entry(row, inner, shift, mask_ptr):
    """Of logits row (o, t): o, t, the flat entry it is about, and whether that entry counts."""
    outer = row // inner
    position = row - outer * inner
    predicted = position + shift
    live = predicted < inner
    entry = outer.to(tl.int64) * inner + tl.where(live, predicted, 0)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + entry) != 0)
    return outer.to(tl.int64), position.to(tl.int64), entry, live


@triton.jit
def _blocks(vocabulary, target, BLOCK: tl.constexpr):
    """Full blocks, the one with the target, and how many blocks the plain loop and the masked loop take.

    target: in [0, vocabulary), or `vocabulary` where there is none.
    """
    full = vocabulary // BLOCK
    target_block = target // BLOCK
    in_full = (target_block < full).to(tl.int32)
    ragged = (full * BLOCK < vocabulary).to(tl.int32)
    return full, target_block, full - in_full, in_full + ragged


@triton.jit
def _masked_block(j, full, target_block):
    """The block that the masked loop takes in turn j: the target's if it is full, then the ragged end."""
    return tl.where((j == 0) & (target_block < full), target_block, full)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def forward_kernel(
    rows_ptr,  # [O, I, V]
    ids_ptr,  # [O, I] int64
    mask_ptr,  # [O, I] uint8, or None
    logp_ptr,  # [O, I] fp32, as are the next three
    entropy_ptr,
    score_ptr,
    lse_ptr,
    inner,
    vocabulary,
    outer_stride,  # in units of VEC, as is the next
    inner_stride,
    shift,  # 0 or 1
    temperature,
    softcap,  # or None
    VEC: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
):
    outer, position, entry, live = _entry(tl.program_id(0), inner, shift, mask_ptr)
    if live:
        BLOCK: tl.constexpr = VECTORS * LANES * VEC
        row_ptr = rows_ptr + (outer * outer_stride + position * inner_stride) * VEC
        tile = _tile(VEC, VECTORS, LANES)
        token = tl.load(ids_ptr + entry)
        known = (token >= 0) & (token < vocabulary)
        target = tl.where(known, token, vocabulary).to(tl.int32)
        full, target_block, plain_blocks, masked_blocks = _blocks(vocabulary, target, BLOCK)
        scale = _LOG2_E / temperature

        peak, sum_exp, sum_centred, sum_sq = row_state.empty(LANES)
        for i in range(plain_blocks):
            block = i + (i >= target_block).to(tl.int32)
            z = _capped(tl.load(row_ptr + block * BLOCK + tile).to(tl.float32), softcap)
            peak, sum_exp, sum_centred, sum_sq = row_state.absorb(peak, sum_exp, sum_centred, sum_sq, z, scale)
        for j in range(masked_blocks):
            index = _masked_block(j, full, target_block) * BLOCK + tile
            counts = (index < vocabulary) & (index != target)
            z = _capped(tl.load(row_ptr + index, mask=counts, other=0.0).to(tl.float32), softcap)
            z = tl.where(counts, z, float("-inf"))
            peak, sum_exp, sum_centred, sum_sq = row_state.absorb(peak, sum_exp, sum_centred, sum_sq, z, scale)

        # Last, since through the loops it would hold a register; the masked one has just read around it.
        z_target = tl.load(row_ptr + target, mask=known, other=float("-inf")).to(tl.float32)
        z_target = _capped(z_target, softcap)
        peak, sum_exp, sum_centred, sum_sq = row_state.collapse(peak, sum_exp, sum_centred, sum_sq, scale)
        logp, entropy, score, lse = row_state.statistics(
            peak, sum_exp, sum_centred, sum_sq, z_target, scale, temperature
        )
        tl.store(logp_ptr + entry, tl.where(known, logp, float("nan")))
        tl.store(entropy_ptr + entry, entropy)
        tl.store(score_ptr + entry, tl.where(known, score, float("nan")))
        tl.store(lse_ptr + entry, lse)
    else:
        tl.store(logp_ptr + entry, 0.0)
        tl.store(entropy_ptr + entry, 0.0)
        tl.store(score_ptr + entry, 0.0)
        tl.store(lse_ptr + entry, 0.0)


@triton.jit
def _pivot(z_target, logp, lse, temperature):
    """z_v - high - low = temperature * log p_v, from the target's logit and logp or from lse.

    Both say the same; the smaller of logp and lse was rounded less when it was saved. The difference z_target
    - temperature * logp goes on as an exact sum high + low (Knuth), since a rounded one is off by 1e-3 where
    lse is 1e4.
    """
    by_target = tl.abs(logp) <= tl.abs(lse)  # a logp of -inf or NaN: false
    minus_logp = 0.0 - logp * temperature
    total = z_target + minus_logp
    from_logp = total - z_target
    error = (z_target - (total - from_logp)) + (minus_logp - from_logp)
    return tl.where(by_target, total, lse * temperature), tl.where(by_target, error, 0.0)


@triton.jit
def _gradient(
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
        z, slope = _softcapped(z, softcap)
    log_p = ((z - high) - low) * scale
    p = tl.exp2(log_p)
    weight = by_p
    if by_p_log_p is not None:
        weight = by_p + tl.maximum(log_p, row_state.EXPONENT_FLOOR) * by_p_log_p
    return p * weight, slope


@triton.jit
def _zero_row(out_ptr, tile, vocabulary, BLOCK: tl.constexpr):
    zeros = (tile * 0).to(out_ptr.dtype.element_ty)
    full = vocabulary // BLOCK
    for block in range(full):
        tl.store(out_ptr + block * BLOCK + tile, zeros)
    if full * BLOCK < vocabulary:
        index = full * BLOCK + tile
        tl.store(out_ptr + index, zeros, mask=index < vocabulary)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def backward_kernel(
    out_ptr,  # [O, I, V], may be rows
    rows_ptr,  # [O, I, V]
    ids_ptr,  # [O, I] int64
    mask_ptr,  # [O, I] uint8, or None
    logp_ptr,  # [O, I] fp32, as are the next two
    entropy_ptr,
    lse_ptr,
    grad_logp_ptr,  # [O, I] fp32, or None, as the next
    grad_entropy_ptr,
    inner,
    vocabulary,
    outer_stride,  # in units of VEC, as are the next three
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    shift,  # 0 or 1
    temperature,
    softcap,  # or None
    VEC: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
):
    outer, position, entry, live = _entry(tl.program_id(0), inner, shift, mask_ptr)
    BLOCK: tl.constexpr = VECTORS * LANES * VEC
    row_ptr = rows_ptr + (outer * outer_stride + position * inner_stride) * VEC
    row_out_ptr = out_ptr + (outer * out_outer_stride + position * out_inner_stride) * VEC
    tile = _tile(VEC, VECTORS, LANES)
    g = 0.0
    if grad_logp_ptr is not None:
        g = tl.load(grad_logp_ptr + entry)
    h = 0.0
    if grad_entropy_ptr is not None:
        h = tl.load(grad_entropy_ptr + entry)
    if live & ((g != 0.0) | (h != 0.0)):
        token = tl.load(ids_ptr + entry)
        known = (token >= 0) & (token < vocabulary)
        target = tl.where(known, token, vocabulary).to(tl.int32)
        logp, lse = tl.load(logp_ptr + entry), tl.load(lse_ptr + entry)
        z_target = tl.load(row_ptr + target, mask=known, other=0.0).to(tl.float32)
        tl.debug_barrier()  # in place, one warp's stores must not overtake another's load of the target
        z_target = _capped(z_target, softcap)
        high, low = _pivot(z_target, logp, lse, temperature)
        scale = _LOG2_E / temperature
        at_target = 0.0 - g * row_state.expm1_of_log_probability(logp)
        by_p = 0.0 - g
        by_p_log_p = None
        if grad_entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + entry)
            p_target = tl.exp(logp)
            at_target -= tl.where(p_target > 0.0, h * p_target * (logp + entropy), 0.0)
            by_p -= h * entropy
            by_p_log_p = (0.0 - h * _LN_2) / temperature
        at_target = at_target / temperature
        by_p = tl.where(known, by_p / temperature, float("nan"))
        full, target_block, plain_blocks, masked_blocks = _blocks(vocabulary, target, BLOCK)

        for i in range(plain_blocks):
            block = i + (i >= target_block).to(tl.int32)
            z = tl.load(row_ptr + block * BLOCK + tile).to(tl.float32)
            dx, slope = _gradient(z, high, low, scale, by_p, by_p_log_p, softcap)
            tl.store(row_out_ptr + block * BLOCK + tile, (dx * slope).to(out_ptr.dtype.element_ty))
        for j in range(masked_blocks):
            index = _masked_block(j, full, target_block) * BLOCK + tile
            inside = index < vocabulary
            z = tl.load(row_ptr + index, mask=inside, other=0.0).to(tl.float32)
            dx, slope = _gradient(z, high, low, scale, by_p, by_p_log_p, softcap)
            dx = tl.where(index == target, at_target, dx) * slope
            tl.store(row_out_ptr + index, dx.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        _zero_row(row_out_ptr, tile, vocabulary, BLOCK)


def forward(
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, score_sqnorm, lse, each [O, I] fp32."""
    outer, inner, vocabulary = rows.shape
    logp, entropy, score, lse = (torch.empty(outer, inner, dtype=torch.float32, device=rows.device) for _ in range(4))
    if outer * inner == 0:
        return logp, entropy, score, lse
    table = launches(rows.device)
    launch = table.forward if softcap is None else table.forward_softcap
    vec = vector_length(rows)
    with on_device_of(rows):
        forward_kernel[(outer * inner,)](
            rows, token_ids.contiguous(), as_bytes(mask), logp, entropy, score, lse,
            inner, vocabulary, *(s // vec for s in rows.stride()[:2]), int(shift), temperature, softcap,
            VEC=vec, VECTORS=_vectors(launch.vectors, rows, vec), LANES=launch.lanes,
            num_warps=launch.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return logp, entropy, score, lse


def backward(
    out: Tensor,  # [O, I, V], written; may be `rows` itself
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    logp: Tensor,  # [O, I] fp32, as are all below
    entropy: Tensor,
    lse: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> None:
    """d rows = g (1[v=y] - p) - h p (log p + H), through softcap and temperature; 0 where g = h = 0."""
    outer, inner, vocabulary = rows.shape
    if outer * inner == 0:
        return
    launch = launches(rows.device).backward
    vec = vector_length(rows, out)
    token_sized = (t if t is None else t.contiguous() for t in (logp, entropy, lse, grad_logp, grad_entropy))
    with on_device_of(rows):
        backward_kernel[(outer * inner,)](
            out, rows, token_ids.contiguous(), as_bytes(mask), *token_sized,
            inner, vocabulary, *(s // vec for t in (rows, out) for s in t.stride()[:2]),
            int(shift), temperature, softcap,
            VEC=vec, VECTORS=_vectors(launch.vectors, rows, vec), LANES=launch.lanes,
            num_warps=launch.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip


def _vectors(vectors: int, rows: Tensor, vec: int) -> int:
    """Accesses per thread: as many elements whether rows are aligned or taken one element at a time."""
    return vectors * access_elements(rows) // vec
