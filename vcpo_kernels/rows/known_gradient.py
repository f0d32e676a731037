"""A gradient that was taken in the forward, before its upstream factor was known: kept by the graph, released by its backward.

Layer: rows. Shared by weighted_logp and linear_weighted_logp. The op `scale_` multiplies by the factor in place, and costs a
pass only where that is not 1.

In fp16 a gradient has to be in range when it is rounded, and the factor that was to bring it there (a GradScaler's) arrives
later: with coefficients of a mean over a million tokens all of it would round to zero. So it is taken times a power of two
that its coefficients are known to bear (`range_factor`), which the release divides out in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.library import define_op, nothing_returned


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    registry.select("scale", gradient.device, gradient.dtype).forward(gradient, factor)


scale_ = define_op("scale_(Tensor(a!) gradient, Tensor factor) -> ()", _scale_, nothing_returned)


def range_factor(dtype: torch.dtype, bound: Tensor, limit: float) -> Tensor | None:
    """The power of two that brings `bound` (0-d, >= 0) to just below `limit`: 0-d fp32. None: the dtype needs none."""
    if dtype != torch.float16:
        return None
    usable = (bound > 0) & bound.isfinite()
    exponent = torch.where(usable, torch.log2(limit / bound.float()).floor(), 0.0)
    return torch.exp2(exponent.clamp(-100, 100))


def magnitudes(coefficients: Tensor, mask: Tensor | None) -> Tensor:
    """|c_t| of the tokens that count, fp32; 0 for what is not finite, which shows in its own row alone."""
    counts = coefficients.isfinite() if mask is None else coefficients.isfinite() & mask
    return torch.where(counts, coefficients, 0.0).abs().float()


def save(ctx: Any, taken_times: Tensor | None, *gradients: Tensor) -> None:
    """Keep gradients, which were taken times a range factor (None: 1), for the backward.

    Detached: an output kept as it is would hold its own graph node alive.
    """
    ctx.known_gradients, ctx.taken_times = tuple(g.detach() for g in gradients), taken_times


def release(ctx: Any, factor: Tensor) -> tuple[Tensor, ...]:
    """The saved gradients times the upstream factor: once, without a copy, unless the graph is to be used again."""
    saved: tuple[Tensor, ...] | None = ctx.known_gradients
    if saved is None:
        raise RuntimeError("Trying to backward through the graph a second time: pass retain_graph=True to the first.")
    if ctx.taken_times is not None:
        factor = factor.float() / ctx.taken_times
    traced = type(factor) is not Tensor  # a graph may not change in its backward what its forward gave
    if traced or _graph_is_kept():
        return tuple(
            g * factor for g in saved
        )  # a 0-d factor keeps its own range: a loss scale of 65536 is inf in fp16
    ctx.known_gradients = None
    for gradient in saved:
        if gradient.numel():
            scale_(gradient, factor)
    return saved


def _graph_is_kept() -> bool:
    """Whether the running backward was called with retain_graph=True. Where torch does not tell, assume so: a copy."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
