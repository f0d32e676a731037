"""token_states on Triton: the loop of token_stats over a shard's part of each row, whose end is the row's state.

Reads N v elements once and writes 20 bytes a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton import row_loops, row_state
from vcpo_kernels.backends.triton.launch import FUSION, as_bytes, launches, on_device_of, vector_length
from vcpo_kernels.rows.shard_states import NUMBERS


@triton.jit(do_not_specialize=[*row_loops.NOT_SPECIALIZED, "tokens"])
def states_kernel(
    rows_ptr,  # [O, I, v]
    ids_ptr,  # [O, I] int64
    mask_ptr,  # [O, I] uint8, or None
    states_ptr,  # [5, O, I] fp32
    tokens,  # O I
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
    to = states_ptr + token
    if valid:
        BLOCK: tl.constexpr = VECTORS * LANES * VEC
        row_ptr = rows_ptr + (outer * outer_stride + position * inner_stride) * VEC
        tile = row_loops.tile_offsets(VEC, VECTORS, LANES)
        known, target = row_loops.target_of(tl.load(ids_ptr + token), vocabulary)
        reference, sum_exp, sum_centred, sum_sq = row_loops.row_lanes(
            row_ptr, target, vocabulary, temperature, softcap, tile, BLOCK, LANES
        )
        target_logit = tl.load(row_ptr + target, mask=known, other=float("-inf")).to(tl.float32)
        reference, sum_exp, sum_centred, sum_sq = row_state.merged(
            reference, sum_exp, sum_centred, sum_sq, row_state.LOG2_E / temperature
        )
        row_loops.store_state(to, tokens, reference, sum_exp, sum_centred, sum_sq, target_logit)
    else:
        row_loops.store_state(to, tokens, float("-inf"), 0.0, 0.0, 0.0, float("-inf"))


def forward(
    rows: Tensor,  # [O, I, v]
    token_ids: Tensor,  # [O, I] int64, counted from the shard's first entry
    mask: Tensor | None,  # [O, I] bool
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> Tensor:
    """[5, O, I] fp32, see the reference."""
    outer, inner, vocabulary = rows.shape
    states = torch.empty((NUMBERS, outer, inner), dtype=torch.float32, device=rows.device)
    if outer * inner == 0:
        return states
    table = launches(rows.device)
    launch = table.forward if softcap is None else table.forward_softcap
    vec = vector_length(rows)
    with on_device_of(rows):
        states_kernel[(outer * inner,)](
            rows, token_ids.contiguous(), as_bytes(mask), states, outer * inner,
            inner, vocabulary, *(s // vec for s in rows.stride()[:2]), int(shift), temperature, softcap,
            VEC=vec, VECTORS=row_loops.vectors_per_thread(launch.vectors, rows, vec), LANES=launch.lanes,
            num_warps=launch.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return states
