"""segment_sum and its adjoint segment_spread: the two ops between tokens [N] and sequences [B].

Layer: tokens [N] -> sequences [B]. Each is the other's backward pass. Segments come as their tensors: mask [N] or None,
offsets [B + 1], order [N] or None (`Segments.tensors`); `Segments` is the public face of both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.library import define_op


def _sum(values: Tensor, *segments: Any) -> Tensor:
    backend = registry.select("segment_sum", values.device, values.dtype)
    total: Tensor = backend.forward(values.contiguous(), *segments)
    return total


def _spread(per_sequence: Tensor, *segments: Any) -> Tensor:
    backend = registry.select("segment_spread", per_sequence.device, per_sequence.dtype)
    tokens: Tensor = backend.forward(per_sequence.contiguous(), *segments)
    return tokens


def _fake_sum(values: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)


def _fake_spread(
    per_sequence: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None, num_tokens: int
) -> Tensor:
    return per_sequence.new_empty(num_tokens)


def _save_segments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    data, *segments = inputs[:4]
    ctx.num_tokens = data.shape[0]
    ctx.save_for_backward(*segments)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return segment_spread(grad, *ctx.saved_tensors, ctx.num_tokens), None, None, None


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return segment_sum(grad, *ctx.saved_tensors), None, None, None, None


# values [N] summed over each sequence's valid tokens -> [B], accumulated in float64. Tokens that the mask excludes are never
# added, so that NaN and inf there do no harm.
segment_sum = define_op(
    "segment_sum(Tensor values, Tensor? mask, Tensor offsets, Tensor? order) -> Tensor",
    _sum, _fake_sum, _save_segments, _sum_backward, twice=True,
)  # fmt: skip
# per_sequence [B] written to each valid token of its sequence -> [num_tokens]; 0 elsewhere.
segment_spread = define_op(
    "segment_spread(Tensor per_sequence, Tensor? mask, Tensor offsets, Tensor? order, SymInt num_tokens) -> Tensor",
    _spread, _fake_spread, _save_segments, _spread_backward, twice=True,
)  # fmt: skip
