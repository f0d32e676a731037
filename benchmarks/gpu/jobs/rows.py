"""Rows of logits: what is timed on them, for which backend, with which floor, and how it is verified.

Every case works on `Inputs` of logits [N, V]. A floor counts passes over N V elements that the work cannot do without: one to
read the logits, one more each for a second read and for a written gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.gpu.plan import Shape
from benchmarks.token_stats_cases import (
    Inputs,
    eager_backward,
    eager_forward,
    ours_backward,
    ours_forward,
    ours_inplace,
)
from vcpo_kernels.core import registry

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORWARD, BACKWARD, BACKWARD_INPLACE = "forward", "forward + backward", "forward + backward, in place"
SCORE, WEIGHTED = "score_rows, in place", "weighted_logp, in place"

# Relative L2 error of a gradient: one rounding to the dtype, a few times over.
GRADIENT_BOUND = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}
VERIFIED_ROWS = 16


@dataclass(frozen=True)
class RowCase:
    """Work on rows. op: what the registry calls the kernel. buffers: passes of NV that must fit into memory at once."""

    work: str
    op: str
    run: Callable[[Inputs], Any]
    floor_nv: int
    inplace: bool = False
    buffers: int = 2

    @property
    def is_forward(self) -> bool:
        return self.work == FORWARD


def score_rows(x: Inputs) -> Tensor:
    """The kernel alone, over the logits: c (1[v = y] - p) takes their place."""
    rows = x.logits[None]
    backend = registry.select("score_rows", rows.device, rows.dtype, rows.shape[-1])
    settings = {"temperature": 1.0, "softcap": None, "shift": False}
    backend.forward(rows, rows, x.token_ids[None], None, x.g[None], **settings)
    return x.logits


def weighted_logp(x: Inputs) -> Tensor:
    """The public function and its backward, over the logits."""
    leaf = x.logits.detach().requires_grad_()
    loss, _ = vk.weighted_logp(leaf.view_as(leaf), x.token_ids, x.g, inplace=True)
    return torch.autograd.grad(loss, leaf)[0]


CASES = (
    RowCase(FORWARD, "token_stats", ours_forward, 1, buffers=1),
    RowCase(BACKWARD, "token_stats", ours_backward, 3, buffers=3),  # the in-place cases' logits are there too
    RowCase(BACKWARD_INPLACE, "token_stats", ours_inplace, 3, inplace=True),
    RowCase(SCORE, "score_rows", score_rows, 2, inplace=True),
    RowCase(WEIGHTED, "score_rows", weighted_logp, 2, inplace=True),
)
GRID = tuple(c for c in CASES if c.work in (FORWARD, BACKWARD, SCORE))  # what is run at every shape


def make_inputs(shape: Shape, device: torch.device, sequence: int = 512) -> Inputs:
    """Logits of standard deviation 3 with an outlier in a thousand, ids sampled from them, one weight per `sequence` rows.

    Made on the device a few rows at a time: nothing else of the logits' size is ever there.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape.rows, shape.vocabulary, dtype=TORCH_DTYPES[shape.dtype], device=device)
    token_ids = torch.empty(shape.rows, dtype=torch.int64, device=device)
    for part, ids in zip(logits.split(256), token_ids.split(256), strict=True):
        z = torch.randn(part.shape, generator=generator, device=device).mul_(3)
        z += 4 * (torch.rand(z.shape, generator=generator, device=device) < 1e-3)
        ids.copy_(torch.multinomial(torch.softmax(z, -1), 1, generator=generator)[:, 0])
        part.copy_(z)
    weights = torch.randn(-(-shape.rows // sequence), generator=generator, device=device)
    return Inputs(logits, token_ids, weights.repeat_interleave(sequence)[: shape.rows].contiguous())


@dataclass(frozen=True)
class Oracle:
    """float64 statistics and gradient of some rows, from the first to the last."""

    index: Tensor
    statistics: tuple[Tensor, Tensor, Tensor]
    gradient: Tensor

    def error(self, case: RowCase, got: Any) -> float:
        """Largest |error| / (1 + |value|) of the statistics, or relative L2 error of the gradient, of these rows."""
        if case.is_forward:
            pairs = zip((t[self.index] for t in got), self.statistics, strict=True)
            return max(float(((a.double() - b).abs() / (1 + b.abs())).max()) for a, b in pairs)
        return float((got[self.index].double() - self.gradient).norm() / self.gradient.norm())


def oracle_of(x: Inputs) -> Oracle:
    rows = len(x.logits)
    index = torch.linspace(0, rows - 1, min(rows, VERIFIED_ROWS), device=x.logits.device).round().long()
    some = Inputs(x.logits[index].double(), x.token_ids[index], x.g[index].double())
    return Oracle(index, eager_forward(some), eager_backward(some))


def error_bound(case: RowCase, backend: str, dtype: torch.dtype) -> float:
    """The package's own bound for statistics, one rounding of the dtype for gradients."""
    return registry.BACKENDS[backend].relative_error if case.is_forward else GRADIENT_BOUND[dtype]
