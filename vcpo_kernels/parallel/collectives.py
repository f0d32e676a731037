"""The sums and gathers that the package makes over process groups, and no others.

Layer: process groups. Each call is one collective (`gathered_rows` two, where ranks have different numbers of rows); none of
them sends objects or waits for a device. torch.compile traces them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcpo_kernels.parallel.ranks import size_of


class _Sum(torch.autograd.Function):
    """Each rank goes on with the whole sum, the same on all: a rank's part of the gradient is that of its own terms."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        return _all_reduce(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _all_reduce(value: Tensor, group: Any) -> Tensor:
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        return functional.all_reduce(value, "sum", group)
    out = value.detach().clone()
    dist.all_reduce(out, group=group)
    return out


def summed(value: Tensor, group: Any) -> Tensor:
    """The sum of the ranks' tensors, on every rank. Differentiable: the gradient of all ranks' parameters is to be summed
    over the ranks, once, as that of terms that each rank has alone.
    """
    if size_of(group) == 1:
        return value
    out: Tensor = _Sum.apply(value, group)
    return out


def gathered_rows(rows: Tensor, group: Any, equal: bool = False) -> tuple[Tensor, slice]:
    """All ranks' rows [B of all, K] in the order of the ranks, and which are this rank's. Not differentiable.

    equal: every rank has as many rows. Where that is not known, their numbers are gathered first and read on the host.
    """
    ranks = size_of(group)
    if ranks == 1:
        return rows, slice(0, len(rows))
    mine = dist.get_rank(group)
    if equal:
        return gathered(rows, group).flatten(0, 1), slice(mine * len(rows), (mine + 1) * len(rows))
    counts = gathered(torch.tensor([len(rows)], device=rows.device), group).flatten().tolist()
    padded = torch.nn.functional.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    every = torch.cat([of_rank[:count] for of_rank, count in zip(gathered(padded, group), counts, strict=True)])
    start = sum(counts[:mine])
    return every, slice(start, start + counts[mine])


def gathered(value: Tensor, group: Any) -> Tensor:
    """The ranks' tensors of one shape, stacked in the order of the ranks: [W, ..]. Not differentiable."""
    ranks = size_of(group)
    value = value.detach().contiguous()
    if ranks == 1:
        return value[None]
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        return functional.all_gather_tensor(value[None], 0, group)
    out = value.new_empty(ranks, *value.shape)
    dist.all_gather_into_tensor(
        out.view(ranks * value.shape[0], *value.shape[1:]) if value.dim() else out, value, group=group
    )
    return out
