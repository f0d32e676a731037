"""segment_sum and its adjoint segment_spread: the two ops between tokens [N] and sequences [B].

`Segments.sum` is the public face of the first; the second is its backward pass, and writes per-token coefficients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.library import LIBRARY, qualified

LIBRARY.define(
    "segment_sum(Tensor values, Tensor? mask, Tensor offsets, Tensor? order) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "segment_spread(Tensor per_sequence, Tensor? mask, Tensor offsets, Tensor? order, SymInt num_tokens) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def segment_sum(values: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None) -> Tensor:
    """values [N] summed over each sequence's valid tokens -> [B], accumulated in float64. Differentiable.

    Tokens that the mask excludes are never added, so that NaN and inf there do no harm.
    """
    total: Tensor = torch.ops.vcpo_kernels.segment_sum(values, mask, offsets, order)
    return total


def segment_spread(
    per_sequence: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None, num_tokens: int
) -> Tensor:
    """per_sequence [B] written to each valid token of its sequence -> [num_tokens]; 0 elsewhere. Differentiable."""
    tokens: Tensor = torch.ops.vcpo_kernels.segment_spread(per_sequence, mask, offsets, order, num_tokens)
    return tokens


def _sum(values: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None) -> Tensor:
    backend = registry.select("segment_sum", values.device, values.dtype)
    total: Tensor = backend.forward(values.contiguous(), mask, offsets, order)
    return total


def _spread(
    per_sequence: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None, num_tokens: int
) -> Tensor:
    backend = registry.select("segment_spread", per_sequence.device, per_sequence.dtype)
    tokens: Tensor = backend.forward(per_sequence.contiguous(), mask, offsets, order, num_tokens)
    return tokens


def _fake_sum(values: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)


def _fake_spread(
    per_sequence: Tensor, mask: Tensor | None, offsets: Tensor, order: Tensor | None, num_tokens: int
) -> Tensor:
    return per_sequence.new_empty(num_tokens)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    data, mask, offsets, order = inputs[:4]
    ctx.num_tokens = data.shape[0]
    ctx.save_for_backward(mask, offsets, order)


def _sum_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask, offsets, order = ctx.saved_tensors
    return segment_spread(grad, mask, offsets, order, ctx.num_tokens), None, None, None


def _spread_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask, offsets, order = ctx.saved_tensors
    return segment_sum(grad, mask, offsets, order), None, None, None, None


for _name, _implementation, _fake, _autograd in (
    ("segment_sum", _sum, _fake_sum, _sum_autograd),
    ("segment_spread", _spread, _fake_spread, _spread_autograd),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified(_name), _fake, lib=LIBRARY)
    torch.library.register_autograd(qualified(_name), _autograd, setup_context=_keep, lib=LIBRARY)
