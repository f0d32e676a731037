"""outer_sqnorm in eager torch: the specification, and what serves a CPU, where torch's GEMMs are hard to beat.

Sequences one by one, since they differ in length; bf16 and fp16 are widened first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels.outer_sqnorm import FormCosts

# Measured on a Zen 4 core: adding up one entry of a product costs as much as 8 of the GEMM's multiplications, and four
# strips of rows leave 5/8 of all pairs to form.
COSTS = FormCosts(gram_share=0.625, pair_cost=16.0, tile_cost=8.0)
STRIPS, LEAST_ROWS = 4, 32  # fewer rows a strip, and the GEMMs become too thin
TILE_ENTRIES = 1 << 18  # 1 MiB of fp32, an L2 cache


def forward(
    left: Tensor,  # [N, P]
    right: Tensor,  # [N, Q]
    offsets: Tensor,  # [B + 1] int64
    max_length: int,
    form: str,
) -> Tensor:
    """[B], fp32 or float64."""
    dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
    bounds = offsets.tolist()
    norms = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        a, b = left[begin:end].to(dtype), right[begin:end].to(dtype)
        chosen = COSTS.form(end - begin, a.shape[1], b.shape[1]) if form == "auto" else form
        norms.append(_gram(a, b) if chosen == "gram" else _tile(a, b))
    return torch.stack(norms).to(dtype) if norms else left.new_empty(0, dtype=dtype)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Strips of rows against themselves and all rows before them, which count twice."""
    total = a.new_zeros((), dtype=torch.float64)
    step = max(LEAST_ROWS, -(-len(a) // STRIPS))
    for begin in range(0, len(a), step):
        rows = slice(begin, begin + step)
        total += _inner(a[rows] @ a[rows].T, b[rows] @ b[rows].T)
        if begin:
            total += 2 * _inner(a[rows] @ a[:begin].T, b[rows] @ b[:begin].T)
    return total


def _tile(a: Tensor, b: Tensor) -> Tensor:
    """Rows of a^T b."""
    total = a.new_zeros((), dtype=torch.float64)
    step = max(1, TILE_ENTRIES // max(b.shape[1], 1))
    for begin in range(0, a.shape[1], step):
        tile = a[:, begin : begin + step].T @ b
        total += _inner(tile, tile)
    return total


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.flatten(), y.flatten())
