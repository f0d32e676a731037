"""segment_spread on Triton: one program per sequence writes its value to its valid tokens, among zeros."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton.launch import FUSION, as_bytes, launches, on_device_of
from vcpo_kernels.backends.triton.segment_sum import segment_range, segment_tokens


@triton.jit(do_not_specialize=["num_tokens"])
def segment_spread_kernel(
    tokens_ptr,  # [N], zero
    per_sequence_ptr,  # [B]
    mask_ptr,  # [N] uint8, or None
    offsets_ptr,  # [B + 1] int64
    order_ptr,  # [N] int64, or None
    num_tokens,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    first, end = segment_range(offsets_ptr, sequence, num_tokens)
    value = tl.load(per_sequence_ptr + sequence)
    for start in range(first, end, BLOCK):
        token, counts = segment_tokens(start + tl.arange(0, BLOCK), end, mask_ptr, order_ptr)
        tl.store(tokens_ptr + token, value, mask=counts)


def forward(
    per_sequence: Tensor,  # [B]
    mask: Tensor | None,  # [N] bool
    offsets: Tensor,  # [B + 1] int64
    order: Tensor | None,  # [N] int64
    num_tokens: int,
) -> Tensor:
    """[N]: each valid token gets its sequence's value; every other token 0."""
    batch = offsets.numel() - 1
    tokens = per_sequence.new_zeros(num_tokens)
    if batch == 0 or num_tokens == 0:
        return tokens
    launch = launches(per_sequence.device).sequence
    with on_device_of(per_sequence):
        segment_spread_kernel[(batch,)](
            tokens, per_sequence.contiguous(), as_bytes(mask), offsets.contiguous(), order, num_tokens,
            BLOCK=launch.block, num_warps=launch.num_warps, enable_fp_fusion=FUSION,
        )  # fmt: skip
    return tokens
