"""score_rows on Triton: one program per row, which reads it twice, the second time out of the L2 cache, and writes once.

The first loop takes the row's state as token_stats' forward pass does; logp and lse stay in registers for the second.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton import row_loops, row_state
from vcpo_kernels.backends.triton.launch import FUSION, as_bytes, launches, on_device_of, vector_length
from vcpo_kernels.rows.statistics import RowStatistics


@triton.jit(do_not_specialize=row_loops.NOT_SPECIALIZED)
def score_rows_kernel(
    out_ptr,  # [O, I, V], may be rows
    rows_ptr,  # [O, I, V]
    ids_ptr,  # [O, I] int64
    mask_ptr,  # [O, I] uint8, or None
    coefficients_ptr,  # [O, I] fp32, or None
    logp_ptr,  # [O, I] fp32, as are the next three
    entropy_ptr,
    score_ptr,
    lse_ptr,
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
    if valid:
        known, target = row_loops.target_of(tl.load(ids_ptr + token), vocabulary)
        logp, entropy, score, lse, high, low = row_loops.row_statistics(
            row_ptr, known, target, vocabulary, temperature, softcap, tile, BLOCK, LANES
        )
        row_loops.store_statistics(logp_ptr, entropy_ptr, score_ptr, lse_ptr, token, logp, entropy, score, lse)
        c = 1.0
        if coefficients_ptr is not None:
            c = tl.load(coefficients_ptr + token)
        tl.debug_barrier()  # in place, one warp's stores must not overtake another's loads
        if c != 0.0:
            scale = row_state.LOG2_E / temperature
            at_target = (0.0 - c * row_state.expm1_of_log_probability(logp)) / temperature
            by_p = tl.where(known, (0.0 - c) / temperature, float("nan"))
            row_loops.write_gradient(
                row_out_ptr, row_ptr, target, at_target, high, low, scale, by_p, None,
                vocabulary, softcap, tile, BLOCK, LAST_FIRST=True,
            )  # fmt: skip
        else:
            row_loops.zero_row(row_out_ptr, tile, vocabulary, BLOCK)
    else:
        row_loops.store_statistics(logp_ptr, entropy_ptr, score_ptr, lse_ptr, token, 0.0, 0.0, 0.0, 0.0)
        row_loops.zero_row(row_out_ptr, tile, vocabulary, BLOCK)


def forward(
    out: Tensor,  # [O, I, V], written; may be `rows` itself
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    coefficients: Tensor | None,  # [O, I] fp32; None: all 1
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> RowStatistics:
    """Each [O, I] fp32; out = c d logp / d rows, and 0 where masked out or c = 0."""
    outer, inner, vocabulary = rows.shape
    statistics = RowStatistics.empty((outer, inner), rows)
    if outer * inner == 0:
        return statistics
    table = launches(rows.device)
    launch = table.score if softcap is None else table.score_softcap
    vec = vector_length(rows, out)
    c = coefficients if coefficients is None else coefficients.contiguous()
    with on_device_of(rows):
        score_rows_kernel[(outer * inner,)](
            out, rows, token_ids.contiguous(), as_bytes(mask), c, *statistics,
            inner, vocabulary, *(s // vec for t in (rows, out) for s in t.stride()[:2]),
            int(shift), temperature, softcap,
            VEC=vec, VECTORS=row_loops.vectors_per_thread(launch.vectors, rows, vec), LANES=launch.lanes,
            num_warps=launch.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return statistics
