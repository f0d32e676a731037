"""The sums and gathers that the package makes over process groups, and no others.

Layer: process groups. Each call is one collective (`gathered_rows` two, where ranks have different numbers of rows); none of
them sends objects or waits for a device. torch.compile traces them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcpo_kernels.parallel.ranks import size_of

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # the old name


class _Sum(torch.autograd.Function):
    """Each rank goes on with the whole sum, the same on all: a rank's part of the gradient is that of its own terms."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        return _all_reduce(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Copied(torch.autograd.Function):
    """Every rank makes another part of the result of the same tensor, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


def _all_reduce(value: Tensor, group: Any) -> Tensor:
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        return functional.all_reduce(value, "sum", group)
    out = value.detach().clone()
    with _explained("the all-reduce", out):
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


def copied(value: Tensor, group: Any) -> Tensor:
    """The tensor, which all ranks have; its gradient is then the sum of theirs, on every rank, by one all-reduce."""
    if size_of(group) == 1:
        return value
    out: Tensor = _Copied.apply(value, group)
    return out


class GatheredRows(NamedTuple):
    """rows: [B of all ranks, K], in the order of the ranks. mine: which are this rank's. first: [B of all], the index of the
    first row of each row's rank.
    """

    rows: Tensor
    mine: slice
    first: Tensor


def gathered_rows(rows: Tensor, group: Any, uneven: bool = False) -> GatheredRows:
    """All ranks' rows, of [B, K] each. Not differentiable.

    uneven: B may differ from rank to rank. The numbers are then gathered first, and read on the host: RuntimeError where
    torch.compile traces the call, which without fullgraph=True then runs it as it is.
    """
    ranks, count = size_of(group), len(rows)
    if ranks == 1:
        return GatheredRows(rows, slice(0, count), torch.zeros(count, dtype=torch.int64, device=rows.device))
    if uneven and torch.compiler.is_compiling():
        raise RuntimeError(
            "vcpo_kernels: Ranks(uneven=True) reads each rank's number of sequences on the host, which torch.compile cannot "
            "trace. Fill the ranks up to one number with sequences whose mask is all False and leave uneven out, compile "
            "without fullgraph=True, or make this call outside of the compiled function."
        )
    rank = dist.get_rank(group)
    if not uneven:
        starts = torch.arange(ranks, device=rows.device) * count
        mine = slice(rank * count, (rank + 1) * count)
        return GatheredRows(gathered(rows, group).flatten(0, 1), mine, starts.repeat_interleave(count))
    counts = gathered(torch.tensor(count, device=rows.device), group)
    numbers = counts.tolist()
    padded = torch.nn.functional.pad(rows, (0, 0, 0, max(numbers) - count))
    every = [of_rank[:n] for of_rank, n in zip(gathered(padded, group), numbers, strict=True)]
    start = sum(numbers[:rank])
    return GatheredRows(
        torch.cat(every), slice(start, start + count), (counts.cumsum(0) - counts).repeat_interleave(counts)
    )


def gathered(value: Tensor, group: Any) -> Tensor:
    """The ranks' tensors of one shape, stacked in the order of the ranks: [W, ..]. Not differentiable."""
    ranks = size_of(group)
    value = value.detach().contiguous()
    if ranks == 1:
        return value[None]
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        return functional.all_gather_tensor(value[None], 0, group)
    own = value.reshape(1) if value.dim() == 0 else value
    out = own.new_empty(ranks * len(own), *own.shape[1:])
    with _explained("the all-gather", own):
        getattr(dist, ALL_GATHER)(out, own, group=group)
    return out.view(ranks, *value.shape)


def exchanged(pieces: Tensor, counts: list[int], group: Any) -> Tensor:
    """pieces [W, R, K]: for each rank one. counts: R of every rank. Returns what all have for this one, [R of all, K]."""
    ranks, size = len(counts), pieces.shape[2]
    sent = pieces.contiguous().view(-1)
    out = sent.new_empty(sum(counts) * size)
    with _explained("the all-to-all", pieces):
        dist.all_to_all_single(out, sent, [n * size for n in counts], [sent.numel() // ranks] * ranks, group=group)
    return out.view(-1, size)


def largest(value: Tensor, group: Any) -> Tensor:
    """Entry by entry the largest of the ranks' tensors, on every rank. Not differentiable."""
    out = value.detach().clone()
    if size_of(group) > 1:
        with _explained("the all-reduce", out):
            dist.all_reduce(out, dist.ReduceOp.MAX, group=group)
    return out


@contextlib.contextmanager
def _explained(what: str, value: Tensor) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"vcpo_kernels: {what} of {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} failed: {error}\n"
            "Another rank has died or raised, makes other calls, or has another number of sequences (Ranks(..., uneven=True)). "
            "TORCH_DISTRIBUTED_DEBUG=DETAIL names the ranks and shapes that differ."
        ) from error
