"""outer_sqnorm in eager torch: the specification, and what serves a CPU, where torch's GEMMs are hard to beat.

Consecutive sequences of one length go through batched GEMMs together; bf16 and fp16 are widened first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from vcpo_kernels.sequence_gradients.outer_sqnorm import FormCosts

# Measured on two Zen 4 cores, fp32, 16 sequences of 256 rows: pairs of [512] and [512] take 9.7 ms in four strips of rows (12.1
# in one, and 5/8 of the multiplications), tiles 13.0. A multiplication among pairs costs 1.2 of one in a tile.
COSTS = FormCosts(ghost_share=0.75, pair_cost=16.0, entry_cost=8.0)
STRIPS = 4
PAIRS_AT_ONCE = 1 << 24  # entries of [sequences, T, T]: 64 MiB
TILE_ENTRIES = 1 << 20  # of fp32, what a last-level cache holds beside its operands


def forward(
    lefts: list[Tensor],  # K of [N, P_k]
    right: Tensor,  # [N, Q]
    offsets: Tensor,  # [B + 1] int64
    max_length: int,
    form: str,
) -> Tensor:
    """[K, B], fp32 or float64."""
    dtype = torch.float64 if right.dtype == torch.float64 else torch.float32
    norms = [right.new_empty((len(lefts), 0), dtype=torch.float64)]
    for begin, count, length in _runs(offsets):
        rows = slice(begin, begin + count * length)
        b, *of_lefts = (x[rows].to(dtype).view(count, length, x.shape[1]) for x in (right, *lefts))
        chosen = COSTS.form(length, sum(a.shape[2] for a in of_lefts), b.shape[2]) if form == "auto" else form
        norms.append(_ghost(of_lefts, b) if chosen == "ghost" else torch.stack([_instantiated(a, b) for a in of_lefts]))
    return torch.cat(norms, 1).to(dtype)


def _runs(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """First row, count and length of consecutive sequences of one length, PAIRS_AT_ONCE at most."""
    begin = int(offsets[0])
    for length, run in itertools.groupby(torch.diff(offsets).tolist()):
        left, at_once = len(list(run)), max(1, PAIRS_AT_ONCE // max(length * length, 1))
        while left:
            count = min(left, at_once)
            yield begin, count, length
            begin, left = begin + count * length, left - count


def _ghost(lefts: list[Tensor], b: Tensor) -> Tensor:
    """Strips of rows against themselves and all rows before them, which count twice. K of [S, T, P_k], [S, T, Q] -> [K, S]."""
    total = b.new_zeros((len(lefts), len(b)), dtype=torch.float64)
    step = max(1, -(-b.shape[1] // STRIPS))
    for begin in range(0, b.shape[1], step):
        end = min(begin + step, b.shape[1])
        of_b = torch.bmm(b[:, begin:end], b[:, :end].transpose(1, 2))
        for of_one, a in zip(total, lefts, strict=True):
            pairs = torch.bmm(a[:, begin:end], a[:, :end].transpose(1, 2)).mul_(of_b)
            of_one += 2 * pairs.sum((1, 2), dtype=torch.float64) - pairs[:, :, begin:].sum((1, 2), dtype=torch.float64)
    return total


def _instantiated(a: Tensor, b: Tensor) -> Tensor:
    """Rows of a^T b, sequence by sequence. [S, T, P], [S, T, Q] -> [S]."""
    step = max(1, TILE_ENTRIES // max(b.shape[2], 1))
    totals = []
    for of_a, of_b in zip(a, b, strict=True):
        tiles = (of_a[:, k : k + step].T @ of_b for k in range(0, a.shape[2], step))
        totals.append(sum((torch.dot(t.flatten(), t.flatten()).double() for t in tiles), a.new_zeros(()).double()))
    return torch.stack(totals)
