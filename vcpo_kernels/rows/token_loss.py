"""token_loss: a scalar whose gradient is known beforehand, one coefficient per token.

Layer: tokens [N] -> scalar. This is the one place where an objective's gradient enters autograd. The op hands on a value and
the coefficients that go with it, and reads neither logp nor entropy, so that what they hold at a dropped token (NaN, inf)
reaches nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.library import LIBRARY, qualified, short_way

LIBRARY.define(
    "token_loss(Tensor logp, Tensor entropy, Tensor coefficients, Tensor? entropy_coefficients, Tensor value) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def token_loss(
    logp: Tensor, entropy: Tensor, coefficients: Tensor, entropy_coefficients: Tensor | None, value: Tensor
) -> Tensor:
    """`value` (0-d), with gradient -coefficients to logp [N] and -entropy_coefficients to entropy [N] (None: none)."""
    loss: Tensor = _call(logp, entropy, coefficients, entropy_coefficients, value)
    return loss


def _token_loss(
    logp: Tensor, entropy: Tensor, coefficients: Tensor, entropy_coefficients: Tensor | None, value: Tensor
) -> Tensor:
    return value.to(logp.dtype, copy=True)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _token_loss_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, entropy_coefficients = ctx.saved_tensors
    to_entropy = None
    if entropy_coefficients is not None and ctx.needs_input_grad[1]:
        to_entropy = _scaled(grad, entropy_coefficients)
    return _scaled(grad, coefficients), to_entropy, None, None, None


def _scaled(grad: Tensor, coefficients: Tensor) -> Tensor:
    # An upstream gradient that overflowed (loss scaling) must not turn a coefficient of 0 into NaN.
    return torch.where(coefficients == 0, 0.0, -grad * coefficients)


LIBRARY.impl("token_loss", _token_loss, "CompositeExplicitAutograd")
torch.library.register_fake(qualified("token_loss"), lambda logp, *rest: logp.new_empty(()), lib=LIBRARY)
torch.library.register_autograd(qualified("token_loss"), _token_loss_autograd, setup_context=_keep, lib=LIBRARY)
_call = short_way("token_loss", _token_loss, _keep, _token_loss_autograd)
