"""outer_sqnorm: squared norm of each sequence's sum of outer products, ||sum_t left_t right_t^T||_F^2.

Layer: tokens [N, P] x [N, Q] -> sequences [B]. It is the squared norm of a Linear layer's weight gradient, sequence by
sequence, from the layer's output gradients and inputs. Two exact forms of one number:

- "ghost": sum_{t,s} (left_t . left_s) (right_t . right_s). T^2 (P + Q) multiplications, half of them by symmetry.
- "instantiated": left^T right [P, Q] in tiles that are squared and dropped. T P Q multiplications.

Neither stores a [P, Q].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.core.library import define_op

FORMS = ("ghost", "instantiated", "auto")


@dataclass(frozen=True)
class FormCosts:
    """What decides between the forms: T^2 (P + Q) ghost_share + T^2 pair_cost against T P Q + P Q entry_cost.

    ghost_share: of the T^2 pairs, those that are formed. pair_cost, entry_cost: of squaring and adding one entry, in
    multiplications of the GEMM.
    """

    ghost_share: float
    pair_cost: float
    entry_cost: float

    def form(self, length: float, p: int, q: int) -> str:
        """The cheaper form for a sequence of `length` rows."""
        ghost = length**2 * ((p + q) * self.ghost_share + self.pair_cost)
        return "ghost" if ghost < p * q * (length + self.entry_cost) else "instantiated"


def outer_sqnorm(left: Tensor, right: Tensor, offsets: Tensor, max_length: int, form: str = "auto") -> Tensor:
    """||sum of left_t right_t^T over t in [offsets[i], offsets[i + 1])||^2 of each sequence i.

    Args:
        left: [N, P], right: [N, Q], one floating dtype.
        offsets: int64 [B + 1], ascending.
        max_length: the longest sequence's rows (an upper bound will do).
        form: "ghost", "instantiated", or "auto" for the cheaper one.

    Returns:
        [B], fp32 (float64 for float64 in). Products of bf16 and fp16 are accumulated in fp32. Not differentiable.

    >>> import torch
    >>> from vcpo_kernels.sequence_gradients.outer_sqnorm import outer_sqnorm
    >>> left, right = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [1.0], [2.0]])
    >>> outer_sqnorm(left, right, torch.tensor([0, 2, 3]), 2)
    tensor([ 9., 36.])
    """
    return outer_sqnorms([left], right, offsets, max_length, form)[0]


def outer_sqnorms(
    lefts: Sequence[Tensor], right: Tensor, offsets: Tensor, max_length: int, form: str = "auto"
) -> Tensor:
    """outer_sqnorm of several lefts [N, P_k] beside one right, [K, B]: its part of the pairs is formed once.

    Layers that read the same input (queries, keys and values; gate and up) have such gradients.
    """
    result: Tensor = _op(lefts, right, offsets, max_length, form)
    return result


def _outer_sqnorm(lefts: list[Tensor], right: Tensor, offsets: Tensor, max_length: int, form: str) -> Tensor:
    Check("outer_sqnorm").choice("form", form, FORMS)
    backend = registry.select("outer_sqnorm", right.device, right.dtype)
    result: Tensor = backend.forward(lefts, right, offsets, max_length, form)
    return result


def _fake(lefts: list[Tensor], right: Tensor, offsets: Tensor, max_length: int, form: str) -> Tensor:
    return right.new_empty((len(lefts), offsets.shape[0] - 1), dtype=wide(right.dtype))


_op = define_op(
    "outer_sqnorm(Tensor[] lefts, Tensor right, Tensor offsets, SymInt max_length, str form) -> Tensor",
    _outer_sqnorm,
    _fake,
)
