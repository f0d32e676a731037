"""The specification of segment_sum in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    values: Tensor,  # [N]
    mask: Tensor | None,  # [N] bool
    offsets: Tensor,  # [B + 1] int64
    order: Tensor | None,  # [N] int64
) -> Tensor:
    """[B] in the dtype of `values`, accumulated in float64."""
    if offsets.numel() == 1:
        return values.new_zeros(0)
    kept = values.double() if mask is None else torch.where(mask, values.double(), 0.0)
    if order is not None:
        kept = kept[order]
    ends = offsets.clamp(max=kept.numel())
    return torch.segment_reduce(kept, "sum", offsets=ends, unsafe=True).to(values.dtype)
