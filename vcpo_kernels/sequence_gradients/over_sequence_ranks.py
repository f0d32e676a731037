"""Squared norms of sequences whose tokens several ranks have (context parallelism).

Layer: tokens -> sequences. A gradient is the sum of the ranks' parts, whose cross terms the norm has: norms of the parts do not
add up to it. So every rank is given all tokens of its share of a parameter's rows: left factors by an all-to-all, right
factors gathered. Norms of such shares do add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcpo_kernels.head.score_matrix import ByColumns
from vcpo_kernels.parallel import collectives
from vcpo_kernels.sequence_gradients.factors import Dense, Lookup, ParameterGradient, Product
from vcpo_kernels.sequence_gradients.norms import one_lookup, one_product, squared_norms, together
from vcpo_kernels.sequence_gradients.row_owners import Spans

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Place(NamedTuple):
    """A parameter: its name, this rank's shape of it under tensor parallelism, its device."""

    name: str
    shape: tuple[int, ...]
    device: torch.device


class _Header(NamedTuple):
    """What ranks tell each other of a parameter's uses, before the factors. offsets: of each sequence's rows, [B + 1]."""

    whole: int  # 1: a gradient [B, *shape]
    step: int  # columns that a block of the left factor may have; 0: no product
    left: int  # dtypes; -1: no such factor
    right: int
    lookup: int
    alike: int  # the first parameter whose right factor is this one's
    product_offsets: list[int]
    lookup_offsets: list[int]

    def flat(self) -> list[int]:
        return [*self[:6], *self.product_offsets, *self.lookup_offsets]

    @staticmethod
    def of(numbers: list[int], sequences: int) -> _Header:
        whole, step, left, right, lookup, alike, *offsets = numbers
        products, lookups = offsets[: sequences + 1], offsets[sequences + 1 :]
        return _Header(whole, step, left, right, lookup, alike, products, lookups)


@dataclass(frozen=True)
class _Uses:
    """Of one parameter on this rank."""

    place: Place
    whole: Tensor | None = None
    product: Product | None = None
    lookup: Lookup | None = None

    @staticmethod
    def of(place: Place, gradient: ParameterGradient | None) -> _Uses:
        if gradient is None:
            return _Uses(place)
        return _Uses(place, gradient.whole, one_product(gradient.products), one_lookup(gradient.lookups))

    def header(self, alike: int, sequences: int) -> _Header:
        product, lookup, none = self.product, self.lookup, [0] * (sequences + 1)
        return _Header(
            int(self.whole is not None),
            0 if product is None else max(product.left.step, 1),
            -1
            if product is None
            else _DTYPES.index(product.left.block(slice(0, 1)).dtype if product.left.width else product.right.dtype),
            -1 if product is None else _DTYPES.index(product.right.dtype),
            -1 if lookup is None else _DTYPES.index(lookup.right.dtype),
            alike,
            none if product is None else product.spans.offsets.tolist(),
            none if lookup is None else lookup.spans.offsets.tolist(),
        )


def squared_norms_over(
    group: Any, sequences: int, uses: list[tuple[Place, ParameterGradient | None]]
) -> dict[str, Tensor]:
    """[B] float64 of each parameter, the same on all ranks of `group`, which all make this call with the same parameters."""
    own = [_Uses.of(place, gradient) for place, gradient in uses]
    headers = _headers(group, sequences, own)
    device = own[0].place.device
    norms = {u.place.name: torch.zeros(sequences, dtype=torch.float64, device=device) for u in own}
    norms |= _norms_of_whole(group, sequences, own, headers)
    alike: dict[tuple[int, ...], list[int]] = {}
    for k, of_ranks in enumerate(headers):
        if any(h.product_offsets[-1] or h.lookup >= 0 for h in of_ranks):
            alike.setdefault(tuple(h.alike for h in of_ranks), []).append(k)
    shared: dict[str, Tensor] = {}
    for members in alike.values():
        rows = _Rows(group, [h.product_offsets for h in headers[members[0]]], device)
        right = _right(rows, own[members[0]], headers[members[0]]) if any(rows.counts) else None
        found = squared_norms([_shares(rows, right, own[k], headers[k]) for k in members])
        shared |= {name: n.to(device) for name, n in found.items()}
    if shared:
        whole = collectives.summed(torch.stack(list(shared.values())), group)
        norms |= dict(zip(shared, whole, strict=True))
    return norms


def _headers(group: Any, sequences: int, own: list[_Uses]) -> list[list[_Header]]:
    """[parameters][ranks]"""
    first: dict[Any, int] = {}
    mine = []
    for k, u in enumerate(own):
        header = u.header(k, sequences)
        if u.product is not None and u.lookup is None:
            right, offsets = u.product.right, tuple(header.product_offsets)
            key = (right.data_ptr(), right.shape, right.stride(), right.dtype, offsets)
            header = header._replace(alike=first.setdefault(key, k))
        mine.append(header.flat())
    every = collectives.gathered(torch.tensor(mine, device=own[0].place.device), group).tolist()
    return [[_Header.of(of_rank[k], sequences) for of_rank in every] for k in range(len(own))]


def _norms_of_whole(group: Any, sequences: int, own: list[_Uses], headers: list[list[_Header]]) -> dict[str, Tensor]:
    """Of gradients that are kept whole: those of all ranks are added up first, in one all-reduce."""
    members = [u for u, of_ranks in zip(own, headers, strict=True) if any(h.whole for h in of_ranks)]
    if not members:
        return {}
    device = own[0].place.device
    parts = [
        torch.zeros(sequences, torch.Size(u.place.shape).numel(), dtype=torch.float64, device=device)
        if u.whole is None
        else u.whole.to(device).double().flatten(1)
        for u in members
    ]
    sums = collectives.summed(torch.cat(parts, 1), group).split([p.shape[1] for p in parts], 1)
    return {u.place.name: s.square().sum(1) for u, s in zip(members, sums, strict=True)}


class _Rows:
    """The rows of all ranks, brought into one order by sequence. offsets: [ranks][B + 1]."""

    def __init__(self, group: Any, offsets: list[list[int]], device: torch.device) -> None:
        self.group, self.device = group, device
        self.counts = [of_rank[-1] for of_rank in offsets]
        spans = [Spans(torch.tensor(o, device=device), 0, False) for o in offsets]
        self.permutation, self.spans = together(spans)

    def gathered(self, rows: Tensor) -> Tensor:
        """Of every rank, [R of this rank, ..] -> [R of all, ..]."""
        most = max(self.counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        every = collectives.gathered(padded, self.group)
        return torch.cat([of_rank[:n] for of_rank, n in zip(every, self.counts, strict=True)])[self.permutation]


@dataclass(frozen=True)
class _Exchanged:
    """This rank's columns of a matrix whose rows the ranks have. Each block is an all-to-all, which all ranks make."""

    left: ByColumns
    rows: _Rows
    width: int  # of each rank, the last one's padded with zeros
    step: int
    dtype: torch.dtype

    def block(self, columns: slice) -> Tensor:
        ranks, own = len(self.rows.counts), self.rows.counts[dist.get_rank(self.rows.group)]
        size = columns.stop - columns.start
        sent = torch.zeros(ranks, own, size, dtype=self.dtype, device=self.rows.device)
        for rank, piece in enumerate(sent):
            start = min(rank * self.width + columns.start, self.left.width)
            stop = min(rank * self.width + columns.stop, self.left.width)
            if own and stop > start:
                piece[:, : stop - start] = self.left.block(slice(start, stop))
        return collectives.exchanged(sent, self.rows.counts, self.rows.group)[self.rows.permutation]

    def selected(self, rows: Tensor) -> ByColumns:
        return Dense(self.block(slice(0, self.width))).selected(rows)


def _right(rows: _Rows, own: _Uses, headers: list[_Header]) -> Tensor:
    """The right factors of all ranks' products [R, Q]."""
    return rows.gathered(_factor(own, None if own.product is None else own.product.right, [h.right for h in headers]))


def _factor(own: _Uses, factor: Tensor | None, dtypes: list[int]) -> Tensor:
    """[R, Q], empty where this rank has none."""
    if factor is not None:
        return factor
    width = own.place.shape[1] if len(own.place.shape) > 1 else 1
    return torch.empty(0, width, dtype=_DTYPES[max(*dtypes, 0)], device=own.place.device)


def _shares(rows: _Rows, right: Tensor | None, own: _Uses, headers: list[_Header]) -> ParameterGradient:
    """Of this rank's share of the parameter's rows, all tokens."""
    ranks, entries = len(headers), own.place.shape[0]
    width, rank = -(-entries // ranks), dist.get_rank(rows.group)
    found = ParameterGradient(own.place.name)
    if right is not None:
        step = -(-min(h.step for h in headers if h.step) // ranks)
        dtype = _DTYPES[max(h.left for h in headers)]
        nothing = Dense(torch.empty(0, entries, dtype=dtype, device=own.place.device))
        left: ByColumns = _Exchanged(nothing if own.product is None else own.product.left, rows, width, step, dtype)
        if step >= width:
            left = Dense(left.block(slice(0, width)))
        found.products.append(Product(left, right, rows.spans))
    if any(h.lookup >= 0 for h in headers):
        of_lookup = _Rows(rows.group, [h.lookup_offsets for h in headers], rows.device)
        table = None if own.lookup is None else own.lookup.right
        values = of_lookup.gathered(_factor(own, table, [h.lookup for h in headers]))
        ids = torch.empty(0, dtype=torch.int64, device=rows.device) if own.lookup is None else own.lookup.ids
        lookup = Lookup(of_lookup.gathered(ids), values, of_lookup.spans)
        found.lookups.append(lookup.within(rank * width, (rank + 1) * width))
    return found
