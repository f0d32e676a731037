"""What the token_stats benchmark compares: the package, eager torch, and torch.compile of the same formulas.

Each case is a function of the inputs. A forward returns (logp, entropy, sum p^2); a backward returns d logits of
sum(g * logp), forward included. Bytes are what the work must move: NV of the logits read, plus NV written for a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vcpo_kernels as vk


@dataclass(frozen=True)
class Inputs:
    """logits [N, V] (any strides), token_ids [N], and the upstream gradient to logp [N]."""

    logits: Tensor
    token_ids: Tensor
    g: Tensor


@dataclass(frozen=True)
class Case:
    """One competitor at one kind of work. work: "forward" or "forward + backward". floor_nv: NV of traffic it must
    move.
    """

    name: str
    work: str
    run: Callable[[Inputs], Any]
    floor_nv: int


def eager_forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """In the logits' own dtype, as trainers write it: fastest in eager torch, and wrong to 2 decimals in bf16."""
    logp = torch.log_softmax(x.logits, -1)
    p = logp.exp()
    return logp.gather(-1, x.token_ids[:, None])[:, 0], -(p * logp).sum(-1), p.square().sum(-1)


def eager_fp32_forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The same after an upcast, which its numbers need."""
    return eager_forward(Inputs(x.logits.float(), x.token_ids, x.g))


def eager_backward(x: Inputs) -> Tensor:
    z = x.logits.detach().requires_grad_()
    logp = torch.log_softmax(z, -1).gather(-1, x.token_ids[:, None])[:, 0]
    return torch.autograd.grad(logp, z, x.g.to(logp.dtype))[0]


def eager_fp32_backward(x: Inputs) -> Tensor:
    z = x.logits.detach().requires_grad_()
    logp = torch.log_softmax(z.float(), -1).gather(-1, x.token_ids[:, None])[:, 0]
    return torch.autograd.grad(logp, z, x.g)[0]


def _logp(z: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(z.float(), -1).gather(-1, token_ids[:, None])[:, 0]


_compiled_logp = torch.compile(_logp, dynamic=False)
_compiled_forward = torch.compile(lambda z, token_ids, g: eager_fp32_forward(Inputs(z, token_ids, g)), dynamic=False)


def compiled_forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _compiled_forward(x.logits, x.token_ids, x.g)
    return result


def compiled_backward(x: Inputs) -> Tensor:
    z = x.logits.detach().requires_grad_()
    return torch.autograd.grad(_compiled_logp(z, x.token_ids), z, x.g)[0]


def ours_forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        stats = vk.token_stats(x.logits, x.token_ids)
    return stats.logp, stats.entropy, stats.sum_p_squared


def ours_backward(x: Inputs) -> Tensor:
    z = x.logits.detach().requires_grad_()
    return torch.autograd.grad(vk.token_stats(z, x.token_ids).logp, z, x.g)[0]


def ours_inplace(x: Inputs) -> Tensor:
    """The gradient over the logits themselves. What it does to them is undone by nobody: give it a copy."""
    z = x.logits.detach().requires_grad_().view_as(x.logits)
    return torch.autograd.grad(vk.token_stats(z, x.token_ids, inplace_backward=True).logp, z, x.g)[0]


FORWARD, BACKWARD = "forward", "forward + backward"
CASES = (
    Case("vcpo_kernels", FORWARD, ours_forward, 1),
    Case("torch eager", FORWARD, eager_forward, 1),
    Case("torch eager, fp32", FORWARD, eager_fp32_forward, 1),
    Case("torch.compile", FORWARD, compiled_forward, 1),
    Case("vcpo_kernels", BACKWARD, ours_backward, 3),
    Case("vcpo_kernels, in place", BACKWARD, ours_inplace, 3),
    Case("torch eager", BACKWARD, eager_backward, 3),
    Case("torch eager, fp32", BACKWARD, eager_fp32_backward, 3),
    Case("torch.compile", BACKWARD, compiled_backward, 3),
)


def make_inputs(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits about as peaked as a language model's: normal with standard deviation 3, one outlier in a thousand."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    logits[torch.rand(rows, vocabulary, generator=generator) < 1e-3] += 4
    token_ids = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
    g = torch.randn(rows, generator=generator)
    return Inputs(logits.to(device, dtype), token_ids.to(device), g.to(device))


def oracle(x: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Forward statistics and gradient in float64."""
    exact = Inputs(x.logits.double(), x.token_ids, x.g.double())
    return eager_forward(exact), eager_backward(exact)


def max_error(case: Case, got: Any, want: tuple[tuple[Tensor, Tensor, Tensor], Tensor]) -> float:
    """Largest |error| / (1 + |value|) of the statistics, or relative L2 error of the gradient."""
    if case.work == FORWARD:
        pairs = zip(got, want[0], strict=True)
        return max(float(((a.double() - b).abs() / (1 + b.abs())).max()) for a, b in pairs)
    return float((got.double() - want[1]).norm() / want[1].norm())
