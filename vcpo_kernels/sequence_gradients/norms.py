"""Squared norms of parameters' gradients, sequence by sequence, from their factors.

Layer: tokens -> sequences. A parameter's uses add up before the square is taken, so that their cross terms are in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.head.score_matrix import blocks_of
from vcpo_kernels.sequence_gradients.factors import (
    Dense,
    Lookup,
    ParameterGradient,
    Product,
    Stacked,
    summed_over_equal,
)
from vcpo_kernels.sequence_gradients.outer_sqnorm import outer_sqnorm, outer_sqnorms
from vcpo_kernels.sequence_gradients.row_owners import Spans


def squared_norms(gradients: Iterable[ParameterGradient]) -> dict[str, Tensor]:
    """[B] float64 of each parameter, by its name. Products with one right factor between them go together."""
    norms: dict[str, Tensor] = {}
    alike: dict[Any, list[tuple[str, Product]]] = {}
    for g in gradients:
        plain = len(g.products) == 1 and not g.lookups and isinstance(g.products[0].left, Dense)
        if plain:
            right = g.products[0].right
            alike.setdefault((right.data_ptr(), right.shape, right.stride(), right.dtype), []).append(
                (g.name, g.products[0])
            )
        else:
            norms[g.name] = _squared_norms(g)
    for group in alike.values():
        spans, right = group[0][1].spans, group[0][1].right
        lefts = [product.left.block(slice(0, product.left.width)) for _, product in group]
        found = outer_sqnorms([x.to(right.dtype) for x in lefts], right, spans.offsets, spans.max_length)
        norms |= {name: n.double() for (name, _), n in zip(group, found, strict=True)}
    return norms


def _squared_norms(gradient: ParameterGradient) -> Tensor:
    if gradient.whole is not None:
        return gradient.whole.flatten(1).double().square().sum(1)
    product, lookup = one_product(gradient.products), one_lookup(gradient.lookups)
    spans = (product or lookup).spans  # type: ignore[union-attr]
    total = torch.zeros(spans.num_sequences, dtype=torch.float64, device=spans.offsets.device)
    if product is not None:
        for columns, block in blocks_of(product.left):
            right = product.right.to(block.dtype)
            total += outer_sqnorm(block, right, product.spans.offsets, product.spans.max_length)
            if lookup is not None:
                total += 2 * _cross(block, columns, right, product.spans, lookup)
    return total if lookup is None else total + _lookup_sqnorm(lookup)


def one_product(products: list[Product]) -> Product | None:
    """All uses as one, each sequence's rows together."""
    if len(products) < 2:
        return products[0] if products else None
    permutation, spans = together([p.spans for p in products])
    left = Stacked(tuple(p.left for p in products), permutation)
    return Product(left, torch.cat([p.right for p in products])[permutation], spans)


def one_lookup(lookups: list[Lookup]) -> Lookup | None:
    if len(lookups) < 2:
        return lookups[0] if lookups else None
    permutation, spans = together([u.spans for u in lookups])
    ids, right = torch.cat([u.ids for u in lookups]), torch.cat([u.right for u in lookups])
    return Lookup(ids[permutation], right[permutation], spans)


def together(spans: list[Spans]) -> tuple[Tensor, Spans]:
    """The permutation that brings the rows of several uses, on top of each other, into one order by sequence."""
    owners, permutation = torch.sort(torch.cat([s.owners() for s in spans]), stable=True)
    return permutation, Spans.of(owners, spans[0].num_sequences)


def _lookup_sqnorm(lookup: Lookup) -> Tensor:
    count = lookup.spans.num_sequences
    total = torch.zeros(count, dtype=torch.float64, device=lookup.ids.device)
    if lookup.ids.numel() == 0:
        return total
    stride = lookup.ids.amax() + 1
    keys, sums = summed_over_equal(lookup.spans.owners() * stride + lookup.ids, lookup.right)
    spans = Spans.of(keys // stride, count)
    return spans.sums(sums.double().square().sum(1, keepdim=True))[:, 0]


def _cross(left: Tensor, columns: slice, right: Tensor, spans: Spans, lookup: Lookup) -> Tensor:
    """sum_{t,s} left[t, ids_s] (right_t . lookup_s) of each sequence, over the ids among `columns`: [B] float64."""
    of_product, of_lookup = spans.offsets.tolist(), lookup.spans.offsets.tolist()
    total = []
    for i in range(spans.num_sequences):
        rows, uses = slice(*of_product[i : i + 2]), slice(*of_lookup[i : i + 2])
        ids = lookup.ids[uses]
        here = ((ids >= columns.start) & (ids < columns.stop)).nonzero()[:, 0]
        picked = left[rows].index_select(1, ids[here] - columns.start).to(wide(left.dtype))
        dots = right[rows].to(picked.dtype) @ lookup.right[uses][here].to(picked.dtype).T
        total.append((picked * dots).sum(dtype=torch.float64))
    return torch.stack(total) if total else torch.zeros(0, dtype=torch.float64, device=left.device)
