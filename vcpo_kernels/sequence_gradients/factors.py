"""A parameter's gradient sequence by sequence, from the factors that a backward leaves: norms, and weighted sums.

Layer: tokens -> sequences. Nothing of the size of B parameters is formed, and nothing of one parameter's size but the
sum that is asked for. A parameter may be used several times (tied weights, a module called twice): its uses add up
before the square is taken, so that their cross terms are in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.head.score_matrix import ByColumns, blocks_of
from vcpo_kernels.sequence_gradients.outer_sqnorm import outer_sqnorm, outer_sqnorms
from vcpo_kernels.sequence_gradients.row_owners import Spans


@dataclass(frozen=True)
class Dense:
    """A matrix in memory."""

    matrix: Tensor

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    @property
    def step(self) -> int:
        return self.width

    def block(self, columns: slice) -> Tensor:
        return self.matrix[:, columns]

    def selected(self, rows: Tensor) -> Dense:
        return Dense(self.matrix[rows])


@dataclass(frozen=True)
class Stacked:
    """Several on top of each other, their rows permuted."""

    parts: tuple[ByColumns, ...]
    permutation: Tensor

    @property
    def width(self) -> int:
        return self.parts[0].width

    @property
    def step(self) -> int:
        return min(p.step for p in self.parts)

    def block(self, columns: slice) -> Tensor:
        return torch.cat([p.block(columns) for p in self.parts])[self.permutation]

    def selected(self, rows: Tensor) -> Stacked:
        return Stacked(self.parts, self.permutation[rows])


@dataclass(frozen=True)
class Product:
    """sum_t left_t right_t^T over each sequence's rows: of a Linear's weight [P, Q]."""

    left: ByColumns
    right: Tensor
    spans: Spans


# Fewer rows than this share with a gradient, and copying them costs less than what they save in two products.
LIVE_SHARE = 0.875


def product_of(grad: Tensor, x: Tensor, spans: Spans, transposed: bool = False) -> Product:
    """sum_t grad_t x_t^T (transposed: x_t grad_t^T), rows without a gradient left out where that pays.

    Those are a masked prompt's in the head, and in the last layer all of its modules after the attention. Counting them
    would make a GPU wait in every module; there the fused head, which leaves them out by the mask, is the way.
    """
    if grad.device.type == "cpu":
        live = _rows_not_zero(grad)
        before = torch.nn.functional.pad(live.cumsum(0), (1, 0))
        if int(before[-1]) < LIVE_SHARE * len(live):
            offsets = before[spans.offsets]
            spans = Spans(offsets, int(torch.diff(offsets).max()) if spans.num_sequences else 0, False)
            grad, x = grad[live], x[live]
    return Product(Dense(x), grad, spans) if transposed else Product(Dense(grad), x, spans)


def _rows_not_zero(rows: Tensor) -> Tensor:
    """Which of [R, P] hold anything but zeros; NaN is something. Most rows show it in their first entries, and a pass over
    the whole of a head's [4096, 32000] would cost as much as reading half a gigabyte does.
    """
    live = rows[:, :64].any(1)
    unsure = (~live).nonzero()[:, 0]
    live[unsure] = rows[unsure].any(1)
    return live


@dataclass(frozen=True)
class Lookup:
    """sum_t e_{ids_t} right_t^T over each sequence's rows: of an Embedding's table [P, Q]."""

    ids: Tensor
    right: Tensor
    spans: Spans


@dataclass
class ParameterGradient:
    """One parameter's uses in one backward. whole: [B, *shape], of parameters small enough to be kept so."""

    name: str
    products: list[Product] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    whole: Tensor | None = None

    def add_whole(self, gradient: Tensor) -> None:
        self.whole = gradient if self.whole is None else self.whole + gradient

    def add_to(self, grad: Tensor, coefficients: Tensor, fresh: bool) -> None:
        """grad += sum_i coefficients[i] gradient_i. fresh: grad holds nothing yet.

        Sequences with a coefficient of 0 take no part, whatever their gradients are: NaN and inf included.
        """
        if fresh and not self.products:
            grad.zero_()
        if self.whole is not None:
            c = coefficients.view(-1, *[1] * (self.whole.dim() - 1)).to(self.whole.dtype)
            grad += torch.where(c != 0, c * self.whole, 0.0).sum(0)
        for k, product in enumerate(self.products):
            _add_product(grad, product, coefficients, fresh and k == 0)
        for lookup in self.lookups:
            _add_lookup(grad, lookup, coefficients)


# --- norms -----------------------------------------------------------------------------------------------------------


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
    product, lookup = _one_product(gradient.products), _one_lookup(gradient.lookups)
    spans = (product or lookup).spans  # type: ignore[union-attr]
    total = torch.zeros(spans.num_sequences, dtype=torch.float64, device=spans.offsets.device)
    if product is not None:
        for columns, block in blocks_of(product.left):
            right = product.right.to(block.dtype)
            total += outer_sqnorm(block, right, product.spans.offsets, product.spans.max_length)
            if lookup is not None:
                total += 2 * _cross(block, columns, right, product.spans, lookup)
    return total if lookup is None else total + _lookup_sqnorm(lookup)


def _one_product(products: list[Product]) -> Product | None:
    """All uses as one, each sequence's rows together."""
    if len(products) < 2:
        return products[0] if products else None
    permutation, spans = _together([p.spans for p in products])
    left = Stacked(tuple(p.left for p in products), permutation)
    return Product(left, torch.cat([p.right for p in products])[permutation], spans)


def _one_lookup(lookups: list[Lookup]) -> Lookup | None:
    if len(lookups) < 2:
        return lookups[0] if lookups else None
    permutation, spans = _together([u.spans for u in lookups])
    ids, right = torch.cat([u.ids for u in lookups]), torch.cat([u.right for u in lookups])
    return Lookup(ids[permutation], right[permutation], spans)


def _together(spans: list[Spans]) -> tuple[Tensor, Spans]:
    """The permutation that brings the rows of several uses, on top of each other, into one order by sequence."""
    owners, permutation = torch.sort(torch.cat([s.owners() for s in spans]), stable=True)
    return permutation, Spans.of(owners, spans[0].num_sequences)


def _runs(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, Q] summed over equal keys: distinct keys ascending, sums. Sorted, so that the order is always the same."""
    sorted_, permutation = torch.sort(keys, stable=True)
    distinct, counts = torch.unique_consecutive(sorted_, return_counts=True)
    return distinct, torch.segment_reduce(rows[permutation].to(wide(rows.dtype)), "sum", lengths=counts, unsafe=True)


def _lookup_sqnorm(lookup: Lookup) -> Tensor:
    count = lookup.spans.num_sequences
    total = torch.zeros(count, dtype=torch.float64, device=lookup.ids.device)
    if lookup.ids.numel() == 0:
        return total
    stride = lookup.ids.amax() + 1
    keys, sums = _runs(lookup.spans.owners() * stride + lookup.ids, lookup.right)
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


# --- weighted sums ---------------------------------------------------------------------------------------------------


def _taking_part(spans: Spans, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
    """Coefficient of each row that takes part, and the indices of these rows; None for all."""
    of_rows = coefficients[spans.owners()]
    rows = (of_rows != 0).nonzero()[:, 0]
    return (of_rows, None) if len(rows) == len(of_rows) else (of_rows[rows], rows)


def _add_product(grad: Tensor, product: Product, coefficients: Tensor, fresh: bool) -> None:
    c, rows = _taking_part(product.spans, coefficients)
    if rows is not None:
        product = Product(product.left.selected(rows), product.right[rows], product.spans)
    left, right = product.left, product.right
    if isinstance(left, Dense) and left.width < right.shape[1]:  # scale the narrower of the two
        product = Product(Dense((left.matrix * c[:, None]).to(left.matrix.dtype)), right, product.spans)
    else:
        product = Product(left, (right * c[:, None]).to(right.dtype), product.spans)
    grad = grad.unsqueeze(-1) if grad.dim() == 1 else grad  # a bias, whose right factors are [R, 1]
    for columns, block in blocks_of(product.left):
        part, into = product.right.to(block.dtype), grad[columns]
        if grad.dtype == block.dtype:
            torch.addmm(into, block.T, part, beta=0 if fresh else 1, out=into)  # beta 0: what is there is not read
        elif fresh:
            into.copy_(block.T @ part)
        else:
            into += block.T @ part


def _add_lookup(grad: Tensor, lookup: Lookup, coefficients: Tensor) -> None:
    c, rows = _taking_part(lookup.spans, coefficients)
    ids, right = (lookup.ids, lookup.right) if rows is None else (lookup.ids[rows], lookup.right[rows])
    if ids.numel():
        distinct, sums = _runs(ids, right.to(wide(right.dtype)) * c[:, None].to(wide(right.dtype)))
        grad[distinct] += sums.to(grad.dtype)
