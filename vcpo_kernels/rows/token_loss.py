"""token_loss and policy_loss: scalars whose gradient is known beforehand, one coefficient per token or per sequence.

Layer: tokens [N] -> scalar. These two ops are where a loss enters autograd. They hand on a value and the coefficients that go
with it, and read neither logp nor entropy, so that what those hold at a dropped token (NaN, inf) reaches nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.library import define_op

# --- a coefficient per token ---------------------------------------------------------------------------------------------


def _token_loss(
    logp: Tensor, entropy: Tensor, coefficients: Tensor, entropy_coefficients: Tensor | None, value: Tensor
) -> Tensor:
    return value.to(logp.dtype, copy=True)


def _save_coefficients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _token_loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, entropy_coefficients = ctx.saved_tensors
    to_entropy = None
    if entropy_coefficients is not None and ctx.needs_input_grad[1]:
        to_entropy = _scaled(grad, entropy_coefficients)
    return _scaled(grad, coefficients), to_entropy, None, None, None


def _scaled(grad: Tensor, coefficients: Tensor) -> Tensor:
    # An upstream gradient that overflowed (loss scaling) must not turn a coefficient of 0 into NaN.
    return torch.where(coefficients == 0, 0.0, -grad * coefficients)


def _scalar(logp: Tensor, *rest: Any) -> Tensor:
    return logp.new_empty(())


# (logp, entropy, coefficients in logp's shape, entropy_coefficients in entropy's or None, value): value, 0-d, with gradient
# -coefficients to logp and -entropy_coefficients to entropy.
token_loss = define_op(
    "token_loss(Tensor logp, Tensor entropy, Tensor coefficients, Tensor? entropy_coefficients, Tensor value) -> Tensor",
    _token_loss, _scalar, _save_coefficients, _token_loss_backward, twice=True, bypass=True,
)  # fmt: skip


# --- a coefficient per sequence ------------------------------------------------------------------------------------------


def _policy_loss(logp: Tensor, coefficients: Tensor, lengths: Tensor, *segments: Any) -> Tensor:
    return -(coefficients.double() * lengths.double()).sum().to(logp.dtype)


def _save_segments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logp, coefficients, _, *segments = inputs
    ctx.num_tokens = logp.shape[0]
    ctx.save_for_backward(coefficients, *segments)


def _policy_loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, *segments = ctx.saved_tensors
    # By name: the op belongs to the layer above (sequences/segment_sum.py).
    to_logp = torch.ops.vcpo_kernels.segment_spread(-grad * coefficients, *segments, ctx.num_tokens)
    return to_logp, None, None, None, None, None


# (logp [N], coefficients [B], lengths [B], and the segments' mask, offsets, order): -sum_i c_i |T_i|, 0-d, with gradient -c_i
# to each valid token of sequence i.
policy_loss = define_op(
    "policy_loss(Tensor logp, Tensor coefficients, Tensor lengths, Tensor? mask, Tensor offsets, Tensor? order) -> Tensor",
    _policy_loss, _scalar, _save_segments, _policy_loss_backward, twice=True, bypass=True,
)  # fmt: skip
