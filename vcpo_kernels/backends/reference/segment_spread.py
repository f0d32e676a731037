"""The specification of segment_spread in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    per_sequence: Tensor,  # [B]
    mask: Tensor | None,  # [N] bool
    offsets: Tensor,  # [B + 1] int64
    order: Tensor | None,  # [N] int64
    num_tokens: int,
) -> Tensor:
    """[N]: each valid token gets its sequence's value; every other token 0."""
    tokens = per_sequence.new_zeros(num_tokens)
    if offsets.numel() == 1 or num_tokens == 0:
        return tokens
    ends = offsets.clamp(max=num_tokens)
    spread = torch.repeat_interleave(per_sequence, torch.diff(ends))
    first, last = int(ends[0]), int(ends[-1])
    if order is None:
        tokens[first:last] = spread
    else:
        tokens[order[first:last]] = spread
    return tokens if mask is None else torch.where(mask, tokens, 0.0)
