"""segment_sum on Triton: one program per sequence, float64 sums in an order that its length fixes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton.launch import FUSION, as_bytes, launches, on_device_of


@triton.jit
def segment_range(offsets_ptr, sequence, num_tokens):
    """First and last + 1 position of a sequence among the sorted ones, clamped to the tokens there are."""
    first = tl.load(offsets_ptr + sequence)
    return tl.minimum(first, num_tokens), tl.minimum(tl.load(offsets_ptr + sequence + 1), num_tokens)


@triton.jit
def segment_tokens(position, end, mask_ptr, order_ptr):
    """Flat token of each position, and whether it lies in the sequence and counts."""
    counts = position < end
    token = position
    if order_ptr is not None:
        token = tl.load(order_ptr + position, mask=counts, other=0)
    if mask_ptr is not None:
        counts = counts & (tl.load(mask_ptr + token, mask=counts, other=0) != 0)
    return token, counts


@triton.jit(do_not_specialize=["num_tokens"])
def segment_sum_kernel(
    total_ptr,  # [B]
    values_ptr,  # [N]
    mask_ptr,  # [N] uint8, or None
    offsets_ptr,  # [B + 1] int64
    order_ptr,  # [N] int64, or None
    num_tokens,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    first, end = segment_range(offsets_ptr, sequence, num_tokens)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(first, end, BLOCK):
        token, counts = segment_tokens(start + tl.arange(0, BLOCK), end, mask_ptr, order_ptr)
        total += tl.load(values_ptr + token, mask=counts, other=0.0).to(tl.float64)
    tl.store(total_ptr + sequence, tl.sum(total, axis=0).to(total_ptr.dtype.element_ty))


def forward(
    values: Tensor,  # [N]
    mask: Tensor | None,  # [N] bool
    offsets: Tensor,  # [B + 1] int64
    order: Tensor | None,  # [N] int64
) -> Tensor:
    """[B] in the dtype of `values`, accumulated in float64."""
    batch = offsets.numel() - 1
    total = torch.empty(batch, dtype=values.dtype, device=values.device)
    if batch == 0:
        return total
    launch = launches(values.device).sequence
    with on_device_of(values):
        segment_sum_kernel[(batch,)](
            total, values.contiguous(), as_bytes(mask), offsets.contiguous(), order, values.numel(),
            BLOCK=launch.block, num_warps=launch.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return total
