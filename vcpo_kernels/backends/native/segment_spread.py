"""segment_spread through the compiled extension, on a CPU's threads."""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels import _native
from vcpo_kernels.backends.native.arguments import segments_argument

_OF_DTYPE = {torch.float32: _native.segment_spread_f32, torch.float64: _native.segment_spread_f64}


def forward(
    per_sequence: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None, num_tokens: int
) -> Tensor:
    """See the reference."""
    out = per_sequence.new_empty(num_tokens)
    with segments_argument(mask, offsets, order, num_tokens) as segments:
        _OF_DTYPE[out.dtype](out.data_ptr(), per_sequence.data_ptr(), segments, torch.get_num_threads())
    return out
