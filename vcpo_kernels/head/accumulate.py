"""Gradients of the head's operands from d logits, added up over its pieces in a dtype that can hold the sum.

Layer: rows. GEMMs are torch's own library's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.head.chunks import empty_large, spans
from vcpo_kernels.head.operands import Head, Needs
from vcpo_kernels.head.score_matrix import LogitsGradient, blocks_of

_PARTIAL_BYTES = 8 << 20  # of a product that waits to be added: small beside a chunk


class HeadGradients(NamedTuple):
    """Of hidden, weight [V, H] and bias [V], as an op returns them: empty where not needed, which `Needs` says."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def fake_gradients(hidden: Tensor, weight: Tensor, needs: Needs) -> HeadGradients:
    """Of these shapes, uninitialised."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return HeadGradients(
        *(hidden.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))
    )


class Sum:
    """A sum of matrix products [rows, columns], in fp32 or float64, cast once at the end.

    A single product is left to the GEMM, whose accumulator is fp32 already. In bf16 and fp16, where torch's GEMM returns
    its own dtype, each of several is rounded once before it is added.
    """

    def __init__(self, rows: int, columns: int, like: Tensor, single: bool) -> None:
        self._like = like
        self._total = empty_large((rows, columns), like, like.dtype if single else wide(like.dtype))
        self._empty = True

    def add(self, a: Tensor, b: Tensor) -> None:
        """total += a b"""
        total, first = self._total, self._empty
        self._empty = False
        if total.dtype == a.dtype:
            torch.addmm(total, a, b, beta=0 if first else 1, out=total)  # beta 0: what is there is not read
            return
        for piece in spans(len(total), max(1, _PARTIAL_BYTES // (b.shape[1] * b.element_size()))):
            product = a[piece] @ b
            total[piece].copy_(product) if first else total[piece].add_(product)

    def result(self) -> Tensor:
        if self._empty:
            self._total.zero_()
        return self._total.to(self._like.dtype)


def gradients(head: Head, d: LogitsGradient, needs: Needs) -> HeadGradients:
    """d logits W [M, H], d logits^T hidden [V, H] and d logits^T 1 [V], by blocks of the vocabulary."""
    hidden, weight = head.hidden, head.weight
    right = d.scaled(hidden) if needs.weight else None
    factors = d.scaled(torch.ones_like(hidden[:, :1])) if needs.bias else None
    grad_weight = empty_large(tuple(weight.shape), hidden) if needs.weight else hidden.new_empty(0)
    grad_bias = hidden.new_empty(len(weight) if needs.bias else 0)
    grad_hidden = Sum(head.rows, hidden.shape[1], hidden, d.matrix.step >= head.vocabulary) if needs.hidden else None
    for entries, block in blocks_of(d.matrix):
        if right is not None:
            torch.mm(block.t(), right, out=grad_weight[entries])
        if factors is not None:
            grad_bias[entries] = (block.t() @ factors)[:, 0]
        if grad_hidden is not None:
            grad_hidden.add(block, weight[entries])
    summed = hidden.new_empty(0) if grad_hidden is None else d.scaled(grad_hidden.result())
    return HeadGradients(summed, grad_weight, grad_bias)
