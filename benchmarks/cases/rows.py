"""Work on rows of logits: inputs, our ways to do it, and float64.

A forward gives (logp, entropy, sum p^2); everything else gives d logits of sum(g * logp), forward included. A floor counts
passes over N V elements: one to read the logits, one more each for a second read and for a written gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.cases.case import OURS, Case
from benchmarks.cases.shapes import Shape
from benchmarks.harness import verify
from vcpo_kernels.core import registry

FORWARD, BACKWARD, BACKWARD_INPLACE = "forward", "forward + backward", "forward + backward, in place"
SCORE, WEIGHTED = "score_rows, in place", "weighted_logp, in place"

# Relative L2 error of a gradient: one rounding to the dtype, a few times over.
GRADIENT_BOUND = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}
# Peers round where we do not (bf16 probabilities, or log-probabilities): wrong here means another function.
PEER_GRADIENT_BOUND = 5e-2
PEER_STATISTICS_BOUND = 5e-1


@dataclass(frozen=True)
class RowInputs:
    """logits [N, V] (any strides), token_ids [N], and the upstream gradient to logp [N]."""

    logits: Tensor
    token_ids: Tensor
    g: Tensor


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.new_empty(0).set_(leaf.detach())  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def computed(leaf: Tensor) -> Tensor:
    """In the leaf's memory, what in-place work takes for a module's output: it refuses leaves and their views."""
    out: Tensor = _Computed.apply(leaf)
    return out


def make_inputs(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> RowInputs:
    """Logits about as peaked as a language model's: normal with standard deviation 3, one outlier in a thousand."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    logits[torch.rand(rows, vocabulary, generator=generator) < 1e-3] += 4
    token_ids = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
    g = torch.randn(rows, generator=generator)
    return RowInputs(logits.to(device, dtype), token_ids.to(device), g.to(device))


def make_inputs_in_parts(shape: Shape, device: torch.device, sequence: int = 512) -> RowInputs:
    """The same kind of logits, of any size, and one weight per `sequence` rows.

    Made on the device a few rows at a time: nothing else of the logits' size is ever there.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape.rows, shape.vocabulary, dtype=shape.torch_dtype, device=device)
    token_ids = torch.empty(shape.rows, dtype=torch.int64, device=device)
    for part, ids in zip(logits.split(256), token_ids.split(256), strict=True):
        z = torch.randn(part.shape, generator=generator, device=device).mul_(3)
        z += 4 * (torch.rand(z.shape, generator=generator, device=device) < 1e-3)
        ids.copy_(torch.multinomial(torch.softmax(z, -1), 1, generator=generator)[:, 0])
        part.copy_(z)
    weights = torch.randn(-(-shape.rows // sequence), generator=generator, device=device)
    return RowInputs(logits, token_ids, weights.repeat_interleave(sequence)[: shape.rows].contiguous())


# --- float64 ---------------------------------------------------------------------------------------------------------


def eager_forward(x: RowInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas in torch, in the logits' own dtype. Trainers write them so: fast, and wrong to 2 decimals in bf16."""
    logp = torch.log_softmax(x.logits, -1)
    p = logp.exp()
    return logp.gather(-1, x.token_ids[:, None])[:, 0], -(p * logp).sum(-1), p.square().sum(-1)


def eager_backward(x: RowInputs) -> Tensor:
    z = x.logits.detach().requires_grad_()
    logp = torch.log_softmax(z, -1).gather(-1, x.token_ids[:, None])[:, 0]
    return torch.autograd.grad(logp, z, x.g.to(logp.dtype))[0]


@dataclass(frozen=True)
class Oracle:
    """float64 statistics and gradient of the rows of `index`."""

    index: Tensor
    statistics: tuple[Tensor, Tensor, Tensor]
    gradient: Tensor


def oracle(x: RowInputs, most: int | None = None) -> Oracle:
    """Of all rows, or of so many from the first to the last."""
    rows = len(x.logits)
    index = torch.linspace(0, rows - 1, min(rows, most or rows), device=x.logits.device).round().long()
    exact = RowInputs(x.logits[index].double(), x.token_ids[index], x.g[index].double())
    return Oracle(index, eager_forward(exact), eager_backward(exact))


def statistics_error(got: Sequence[Tensor], want: Oracle) -> float:
    return verify.largest_error([t[want.index] for t in got], want.statistics)


def gradient_error(got: Tensor, want: Oracle) -> float:
    return verify.relative_error(got[want.index], want.gradient)


def error_bound(case: Case[RowInputs], backend: str, dtype: torch.dtype) -> float:
    """The package's own bound for statistics, one rounding of the dtype for gradients; peers may be further off."""
    if not case.ours:
        return PEER_STATISTICS_BOUND if case.work == FORWARD else PEER_GRADIENT_BOUND
    return registry.BACKENDS[backend].relative_error if case.work == FORWARD else GRADIENT_BOUND[dtype]


# --- ours ------------------------------------------------------------------------------------------------------------


def ours_forward(x: RowInputs) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        stats = vk.token_stats(x.logits, x.token_ids)
    return stats.logp, stats.entropy, stats.sum_p_squared


def ours_backward(x: RowInputs) -> Tensor:
    z = x.logits.detach().requires_grad_()
    return torch.autograd.grad(vk.token_stats(z, x.token_ids).logp, z, x.g)[0]


def ours_inplace(x: RowInputs) -> Tensor:
    """The gradient over the logits themselves. What it does to them is undone by nobody: give it a copy."""
    z = computed(x.logits.detach().requires_grad_())
    return torch.autograd.grad(vk.token_stats(z, x.token_ids, inplace_backward=True).logp, z, x.g)[0]


def score_rows(x: RowInputs) -> Tensor:
    """The kernel alone, over the logits: c (1[v = y] - p) takes their place."""
    rows = x.logits[None]
    backend = registry.select("score_rows", rows.device, rows.dtype, rows.shape[-1])
    settings = {"temperature": 1.0, "softcap": None, "shift": False}
    backend.forward(rows, rows, x.token_ids[None], None, x.g[None], **settings)
    return x.logits


def weighted_logp(x: RowInputs) -> Tensor:
    """The public function and its backward, over the logits."""
    leaf = x.logits.detach().requires_grad_()
    loss, _ = vk.weighted_logp(computed(leaf), x.token_ids, x.g, inplace=True)
    return torch.autograd.grad(loss, leaf)[0]


STATISTICS = Case(OURS, FORWARD, ours_forward, statistics_error, op="token_stats", floor_nv=1, buffers=1)
# The in-place cases' logits are there too.
GRADIENT = Case(OURS, BACKWARD, ours_backward, gradient_error, op="token_stats", floor_nv=3, buffers=3)
INPLACE = Case(OURS, BACKWARD_INPLACE, ours_inplace, gradient_error, op="token_stats", floor_nv=3, inplace=True)
SCORE_ROWS = Case(OURS, SCORE, score_rows, gradient_error, op="score_rows", floor_nv=2, inplace=True)
WEIGHTED_LOGP = Case(OURS, WEIGHTED, weighted_logp, gradient_error, op="score_rows", floor_nv=2, inplace=True)
CASES = (STATISTICS, GRADIENT, INPLACE, SCORE_ROWS, WEIGHTED_LOGP)
GRID = (STATISTICS, GRADIENT, SCORE_ROWS)  # what `make gpu` runs at every shape
