"""token_stats on Triton: one program per row, one pass over it.

Forward: reads N V elements once and writes 16 bytes per row. Backward: reads once more, writes once. In sm_90
SASS the main loops take 11.4 instructions per bf16 element forward and 10.1 backward (with a gradient to the
entropy); an H100 issues about 19 in the time that 3 TB/s bring one. A softcap makes that 35
and 40, which is bound by arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton import row_loops, row_state
from vcpo_kernels.backends.triton.launch import FUSION, as_bytes, launches, on_device_of, vector_length
from vcpo_kernels.rows.statistics import RowStatistics


@triton.jit(do_not_specialize=row_loops.NOT_SPECIALIZED)
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
    outer, position, token, valid = row_loops.token_of(tl.program_id(0), inner, shift, mask_ptr)
    if valid:
        BLOCK: tl.constexpr = VECTORS * LANES * VEC
        row_ptr = rows_ptr + (outer * outer_stride + position * inner_stride) * VEC
        tile = row_loops.tile_offsets(VEC, VECTORS, LANES)
        known, target = row_loops.target_of(tl.load(ids_ptr + token), vocabulary)
        logp, entropy, score, lse, _, _ = row_loops.row_statistics(
            row_ptr, known, target, vocabulary, temperature, softcap, tile, BLOCK, LANES
        )
        row_loops.store_statistics(logp_ptr, entropy_ptr, score_ptr, lse_ptr, token, logp, entropy, score, lse)
    else:
        row_loops.store_statistics(logp_ptr, entropy_ptr, score_ptr, lse_ptr, token, 0.0, 0.0, 0.0, 0.0)


@triton.jit(do_not_specialize=row_loops.NOT_SPECIALIZED)
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
    target_logits_ptr,  # [O, I] fp32 where rows are blocks of a vocabulary, or None
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
    outer, position, token, valid = row_loops.token_of(tl.program_id(0), inner, shift, mask_ptr)
    BLOCK: tl.constexpr = VECTORS * LANES * VEC
    row_ptr = rows_ptr + (outer * outer_stride + position * inner_stride) * VEC
    row_out_ptr = out_ptr + (outer * out_outer_stride + position * out_inner_stride) * VEC
    tile = row_loops.tile_offsets(VEC, VECTORS, LANES)
    g = 0.0
    if grad_logp_ptr is not None:
        g = tl.load(grad_logp_ptr + token)
    h = 0.0
    if grad_entropy_ptr is not None:
        h = tl.load(grad_entropy_ptr + token)
    if valid & ((g != 0.0) | (h != 0.0)):
        known, target = row_loops.target_of(tl.load(ids_ptr + token), vocabulary)
        logp, lse = tl.load(logp_ptr + token), tl.load(lse_ptr + token)
        if target_logits_ptr is None:
            z_target = tl.load(row_ptr + target, mask=known, other=0.0).to(tl.float32)
            in_vocabulary = known
        else:
            z_target = tl.load(target_logits_ptr + token)
            in_vocabulary = logp == logp  # an id outside this block lies in another one; a NaN of the forward stays one
        z_target = row_loops.capped(z_target, softcap)
        high, low = row_loops.saved_pivot(z_target, logp, lse, temperature)
        if target_logits_ptr is None:
            if row_loops.lost_digits(logp, lse):  # in blocks so small that their registers are free in the loop below
                _, _, _, _, high, low = row_loops.row_statistics(
                    row_ptr, known, target, vocabulary, temperature, softcap,
                    row_loops.tile_offsets(VEC, 1, LANES), LANES * VEC, LANES,
                )  # fmt: skip
            tl.debug_barrier()  # in place, one warp's stores must not overtake another's loads
        scale = row_state.LOG2_E / temperature
        at_target = 0.0 - g * row_state.expm1_of_log_probability(logp)
        by_p = 0.0 - g
        by_p_log_p = None
        if grad_entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + token)
            p_target = tl.exp(logp)
            at_target -= tl.where(p_target > 0.0, h * p_target * (logp + entropy), 0.0)
            by_p -= h * entropy
            by_p_log_p = (0.0 - h * row_state.LN_2) / temperature
        at_target = at_target / temperature
        by_p = tl.where(in_vocabulary, by_p / temperature, float("nan"))
        row_loops.write_gradient(
            row_out_ptr, row_ptr, target, at_target, high, low, scale, by_p, by_p_log_p,
            vocabulary, softcap, tile, BLOCK, LAST_FIRST=False,
        )  # fmt: skip
    else:
        row_loops.zero_row(row_out_ptr, tile, vocabulary, BLOCK)


def forward(
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> RowStatistics:
    """Each [O, I] fp32."""
    outer, inner, vocabulary = rows.shape
    statistics = RowStatistics.empty((outer, inner), rows)
    if outer * inner == 0:
        return statistics
    table = launches(rows.device)
    launch = table.forward if softcap is None else table.forward_softcap
    vec = vector_length(rows)
    with on_device_of(rows):
        forward_kernel[(outer * inner,)](
            rows, token_ids.contiguous(), as_bytes(mask), *statistics,
            inner, vocabulary, *(s // vec for s in rows.stride()[:2]), int(shift), temperature, softcap,
            VEC=vec, VECTORS=row_loops.vectors_per_thread(launch.vectors, rows, vec), LANES=launch.lanes,
            num_warps=launch.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return statistics


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
    target_logits: Tensor | None = None,
) -> None:
    """d rows = g (1[v=y] - p) - h p (log p + H), through softcap and temperature; 0 where g = h = 0.

    target_logits [O, I] fp32: the rows hold a block of their vocabulary, see the reference.
    """
    outer, inner, vocabulary = rows.shape
    if outer * inner == 0:
        return
    launch = launches(rows.device).backward
    vec = vector_length(rows, out)
    token_sized = (
        t if t is None else t.contiguous() for t in (logp, entropy, lse, grad_logp, grad_entropy, target_logits)
    )
    with on_device_of(rows):
        backward_kernel[(outer * inner,)](
            out, rows, token_ids.contiguous(), as_bytes(mask), *token_sized,
            inner, vocabulary, *(s // vec for t in (rows, out) for s in t.stride()[:2]),
            int(shift), temperature, softcap,
            VEC=vec, VECTORS=row_loops.vectors_per_thread(launch.vectors, rows, vec), LANES=launch.lanes,
            num_warps=launch.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip
