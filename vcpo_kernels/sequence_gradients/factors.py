"""A parameter's gradient sequence by sequence, as the factors that a backward leaves of it, and their weighted sum.

Layer: tokens. Nothing of the size of B parameters is formed, and nothing of one parameter's size but the sum that is asked
for. A parameter may be used several times (tied weights, a module called twice). Norms are in `norms.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import widened
from vcpo_kernels.head.score_matrix import ByColumns, blocks_of
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
ACTIVE_SHARE = 0.875


def product_of(grad: Tensor, x: Tensor, spans: Spans, transposed: bool = False) -> Product:
    """sum_t grad_t x_t^T (transposed: x_t grad_t^T), rows without a gradient left out where that pays.

    Those are a masked prompt's in the head, and in the last layer all of its modules after the attention. Counting them
    would make a GPU wait in every module; there the fused head, which leaves them out by the mask, is the way.
    """
    if grad.device.type == "cpu":
        active = _rows_not_zero(grad)
        before = torch.nn.functional.pad(active.cumsum(0), (1, 0))
        if int(before[-1]) < ACTIVE_SHARE * len(active):
            offsets = before[spans.offsets]
            spans = Spans(offsets, int(torch.diff(offsets).max()) if spans.num_sequences else 0, False)
            grad, x = grad[active], x[active]
    return Product(Dense(x), grad, spans) if transposed else Product(Dense(grad), x, spans)


def _rows_not_zero(rows: Tensor) -> Tensor:
    """Which of [R, P] hold anything but zeros; NaN is something. Most rows show it in their first entries, and a pass over
    the whole of a head's [4096, 32000] would cost as much as reading half a gigabyte does.
    """
    found = rows[:, :64].any(1)
    unsure = (~found).nonzero()[:, 0]
    found[unsure] = rows[unsure].any(1)
    return found


@dataclass(frozen=True)
class Lookup:
    """sum_t e_{ids_t} right_t^T over each sequence's rows: of an Embedding's table [P, Q]."""

    ids: Tensor
    right: Tensor
    spans: Spans

    def within(self, start: int, stop: int) -> Lookup:
        """Of rows [start, stop) of the table alone, counted from the first. The others' rows are zeros, of any id."""
        inside = (self.ids >= start) & (self.ids < stop)
        ids = torch.where(inside, self.ids - start, 0)
        return Lookup(ids, torch.where(inside[:, None], self.right, 0.0), self.spans)


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


def summed_over_equal(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, Q] summed over equal keys: distinct keys ascending, sums. Sorted, so that the order is always the same."""
    sorted_, permutation = torch.sort(keys, stable=True)
    distinct, counts = torch.unique_consecutive(sorted_, return_counts=True)
    return distinct, torch.segment_reduce(widened(rows[permutation]), "sum", lengths=counts, unsafe=True)


# --- weighted sums ---------------------------------------------------------------------------------------------------


def _active_rows(spans: Spans, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
    """Coefficients of the rows that have one, and the indices of these rows; None for all."""
    of_rows = coefficients[spans.owners()]
    rows = (of_rows != 0).nonzero()[:, 0]
    return (of_rows, None) if len(rows) == len(of_rows) else (of_rows[rows], rows)


def _add_product(grad: Tensor, product: Product, coefficients: Tensor, fresh: bool) -> None:
    c, rows = _active_rows(product.spans, coefficients)
    if rows is not None:
        product = Product(product.left.selected(rows), product.right[rows], product.spans)
    left, right = product.left, product.right
    if isinstance(left, Dense) and left.width < right.shape[1]:  # scale the narrower of the two
        product = Product(Dense((left.matrix * c[:, None]).to(left.matrix.dtype)), right, product.spans)
    else:
        product = Product(left, (right * c[:, None]).to(right.dtype), product.spans)
    grad = grad.unsqueeze(-1) if grad.dim() == 1 else grad  # a bias, whose right factors are [R, 1]
    if fresh and product.left.width < len(grad):  # a vocabulary's padding
        grad[product.left.width :] = 0
    for columns, block in blocks_of(product.left):
        part, into = product.right.to(block.dtype), grad[columns]
        if grad.dtype == block.dtype:
            torch.addmm(into, block.T, part, beta=0 if fresh else 1, out=into)  # beta 0: what is there is not read
        elif fresh:
            into.copy_(block.T @ part)
        else:
            into += block.T @ part


def _add_lookup(grad: Tensor, lookup: Lookup, coefficients: Tensor) -> None:
    c, rows = _active_rows(lookup.spans, coefficients)
    ids, right = (lookup.ids, lookup.right) if rows is None else (lookup.ids[rows], lookup.right[rows])
    if ids.numel() and len(grad):
        wide_right = widened(right)
        distinct, sums = summed_over_equal(ids, wide_right * c[:, None].to(wide_right.dtype))
        grad[distinct] += sums.to(grad.dtype)
