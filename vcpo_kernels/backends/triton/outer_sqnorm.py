"""outer_sqnorm on Triton: one program per tile, which it forms in registers, squares and adds up. No [P, Q], no [T, T].

Products of bf16 and fp16 go through the tensor cores with fp32 accumulators; fp32 is multiplied as fp32, not as tf32,
whose ten bits of mantissa would show in the norms. Each program's part is stored and summed afterwards, so that results are
bitwise repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton.launch import FUSION, launches, on_device_of
from vcpo_kernels.backends.triton.segment_sum import segment_range
from vcpo_kernels.core import registry
from vcpo_kernels.sequence_gradients.outer_sqnorm import FormCosts

# Half of the pairs and the diagonal blocks; what is added up stays in registers, and costs next to nothing. By count of
# multiplications: no GPU has measured it.
COSTS = FormCosts(ghost_share=0.55, pair_cost=2.0, entry_cost=2.0)


@triton.jit
def _operand(x, WIDEN: tl.constexpr):
    """As tl.dot takes it. WIDEN: under the interpreter, whose tl.dot multiplies the bits of bf16 as integers."""
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _rows_against(pointer, stride, rows, others, end, width, T: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr):
    """rows [T] times others [T], transposed: [T, T] fp32. Rows from `end` on are zeros."""
    total = tl.zeros([T, T], dtype=tl.float32)
    for start in range(0, width, K):
        columns = start + tl.arange(0, K)
        a = tl.load(
            pointer + rows[:, None] * stride + columns[None, :],
            mask=(rows[:, None] < end) & (columns[None, :] < width),
            other=0.0,
        )
        b = tl.load(
            pointer + others[:, None] * stride + columns[None, :],
            mask=(others[:, None] < end) & (columns[None, :] < width),
            other=0.0,
        )
        total = tl.dot(_operand(a, WIDEN), tl.trans(_operand(b, WIDEN)), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["p", "q", "num_rows", "pairs"])
def ghost_kernel(
    partial_ptr,  # [B, pairs] fp32
    left_ptr,  # [N, P], last dimension contiguous
    right_ptr,  # [N, Q]
    offsets_ptr,  # [B + 1] int64
    p,
    q,
    left_stride,
    right_stride,
    num_rows,
    pairs,
    T: tl.constexpr,
    K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sequence, pair = program // pairs, (program % pairs).to(tl.int32)
    # pair = r (r + 1) / 2 + s with s <= r; the root of a large number may be off by one
    r = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    r = tl.where(r * (r + 1) // 2 > pair, r - 1, r)
    r = tl.where((r + 1) * (r + 2) // 2 <= pair, r + 1, r)
    s = pair - r * (r + 1) // 2
    first, end = segment_range(offsets_ptr, sequence, num_rows)
    total = 0.0
    if first + r * T < end:
        rows, others = first + r * T + tl.arange(0, T), first + s * T + tl.arange(0, T)
        of_left = _rows_against(left_ptr, left_stride, rows, others, end, p, T, K, WIDEN)
        of_right = _rows_against(right_ptr, right_stride, rows, others, end, q, T, K, WIDEN)
        total = tl.sum(tl.sum(of_left * of_right, axis=1), axis=0)
        total = tl.where(r == s, total, 2.0 * total)
    tl.store(partial_ptr + program, total)


@triton.jit(do_not_specialize=["p", "q", "num_rows", "tiles", "across"])
def instantiated_kernel(
    partial_ptr,  # [B, tiles] fp32
    left_ptr,  # [N, P], last dimension contiguous
    right_ptr,  # [N, Q]
    offsets_ptr,  # [B + 1] int64
    p,
    q,
    left_stride,
    right_stride,
    num_rows,
    tiles,
    across,  # tiles along Q
    T: tl.constexpr,
    K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sequence, tile = program // tiles, (program % tiles).to(tl.int32)
    of_p = (tile // across) * T + tl.arange(0, T)
    of_q = (tile % across) * T + tl.arange(0, T)
    first, end = segment_range(offsets_ptr, sequence, num_rows)
    total = tl.zeros([T, T], dtype=tl.float32)
    for start in range(first, end, K):
        rows = start + tl.arange(0, K)
        a = tl.load(
            left_ptr + rows[:, None] * left_stride + of_p[None, :],
            mask=(rows[:, None] < end) & (of_p[None, :] < p),
            other=0.0,
        )
        b = tl.load(
            right_ptr + rows[:, None] * right_stride + of_q[None, :],
            mask=(rows[:, None] < end) & (of_q[None, :] < q),
            other=0.0,
        )
        total = tl.dot(tl.trans(_operand(a, WIDEN)), _operand(b, WIDEN), total, input_precision="ieee")
    tl.store(partial_ptr + program, tl.sum(tl.sum(total * total, axis=1), axis=0))


def forward(
    lefts: list[Tensor],  # K of [N, P_k]
    right: Tensor,  # [N, Q]
    offsets: Tensor,  # [B + 1] int64
    max_length: int,
    form: str,
) -> Tensor:
    """[K, B] fp32. Each left on its own: what they share would have to wait in memory for all of them."""
    return torch.stack([_one(left, right, offsets, max_length, form) for left in lefts])


def _one(left: Tensor, right: Tensor, offsets: Tensor, max_length: int, form: str) -> Tensor:
    batch, p, q = offsets.numel() - 1, left.shape[1], right.shape[1]
    launch = launches(left.device).outer if left.element_size() == 2 else launches(left.device).outer_fp32
    size = launch.tile
    left, right = (x if x.stride(-1) == 1 else x.contiguous() for x in (left, right))
    chosen = COSTS.form(max_length, p, q) if form == "auto" else form
    strips, down, across = (triton.cdiv(n, size) for n in (max_length, p, q))
    programs = strips * (strips + 1) // 2 if chosen == "ghost" else down * across
    partial = torch.empty(batch, programs, dtype=torch.float32, device=left.device)
    if batch * programs:
        sizes = (p, q, left.stride(0), right.stride(0), left.shape[0], programs)
        meta = {"T": size, "K": launch.depth, "WIDEN": registry.triton_interpreted()}
        meta |= {"num_warps": launch.num_warps, "enable_fp_fusion": FUSION}
        with on_device_of(left):
            if chosen == "ghost":
                ghost_kernel[(batch * programs,)](partial, left, right, offsets, *sizes, **meta)
            else:
                instantiated_kernel[(batch * programs,)](partial, left, right, offsets, *sizes, across, **meta)
    return partial.sum(1, dtype=torch.float64).float()
