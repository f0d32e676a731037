"""What dtypes numbers are kept in, and what autograd and autocast will ask of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums of this dtype are kept in: fp32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values.to(dtype); no call where it is of it already, since even one that does nothing takes a kernel's time on a host."""
    return values if values.dtype == dtype else values.to(dtype)


def widened(values: Tensor) -> Tensor:
    """The tensor in `wide` of its dtype: itself where it is fp32 or float64 already."""
    return in_dtype(values, wide(values.dtype))


def detached(values: Tensor) -> Tensor:
    """values.detach(), where there is anything to be detached from."""
    return values.detach() if values.requires_grad else values


def needs_grad(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of them autograd will ask a gradient for."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t is not None and t.requires_grad for t in tensors)


def no_autocast(x: Tensor) -> torch.autocast:
    """Inside an op the dtypes are settled: autocast would cast fp32 operands, and miss the `out` they go to."""
    return torch.autocast(x.device.type, enabled=False)


# torch before 2.11: PyTorch #158232.
CASTS_STAY_DETACHED = torch.__version__ < "2.11"


def forget_detached_casts(x: Any) -> None:
    """After a forward without gradients whose output is x: its casts of weights are not to serve the next one.

    Within an autocast region each weight is cast once. Until torch 2.10 a cast made under no_grad stays without a graph there,
    and in a later forward of the region, one with gradients, the weight gets none, and nothing says so.
    """
    if CASTS_STAY_DETACHED and isinstance(x, Tensor) and not x.requires_grad and not torch.compiler.is_compiling():
        torch.clear_autocast_cache()
