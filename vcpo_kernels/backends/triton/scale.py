"""scale_ on Triton: a factor of 1 is seen on the device, without waiting for it, and leaves the gradient unread."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton.launch import launches, on_device_of


@triton.jit(do_not_specialize=["size"])
def scale_kernel(
    gradient_ptr,  # [size]
    factor_ptr,  # []
    size,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        if tl.program_id(0) < tl.num_programs(0) - 1:  # without a mask, whose unknown length would forbid wide accesses
            value = tl.load(gradient_ptr + index).to(tl.float32)
            tl.store(gradient_ptr + index, (value * factor).to(gradient_ptr.dtype.element_ty))
        else:
            inside = index < size
            value = tl.load(gradient_ptr + index, mask=inside).to(tl.float32)
            tl.store(gradient_ptr + index, (value * factor).to(gradient_ptr.dtype.element_ty), mask=inside)


def forward(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a 0-d tensor."""
    if not gradient.is_contiguous():
        gradient.mul_(factor)  # a view of the logits, taken in place
        return
    launch = launches(gradient.device).scale
    size = gradient.numel()
    with on_device_of(gradient):
        scale_kernel[(triton.cdiv(size, launch.block),)](
            gradient, factor.contiguous(), size, BLOCK=launch.block, num_warps=launch.num_warps
        )
