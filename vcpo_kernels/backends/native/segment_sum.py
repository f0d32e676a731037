"""segment_sum through the compiled extension, on a CPU's threads."""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels import _native
from vcpo_kernels.backends.native.arguments import segments_argument

_OF_DTYPE = {torch.float32: _native.segment_sum_f32, torch.float64: _native.segment_sum_f64}


def forward(values: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None) -> Tensor:
    """See the reference."""
    out = values.new_empty(offsets.shape[0] - 1)
    with segments_argument(mask, offsets, order, values.shape[0]) as segments:
        _OF_DTYPE[values.dtype](out.data_ptr(), values.data_ptr(), segments, torch.get_num_threads())
    return out
