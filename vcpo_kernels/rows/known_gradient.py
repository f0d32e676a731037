"""A gradient that was taken in the forward, before its upstream factor was known: kept by the graph, released by its backward.

Layer: rows. Shared by weighted_logp and linear_weighted_logp. The op `scale_` multiplies by the factor in place, and costs a
pass only where that is not 1.
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


def save(ctx: Any, *gradients: Tensor) -> None:
    """Keep gradients for the backward. Detached: an output kept as it is would hold its own graph node alive."""
    ctx.known_gradients = tuple(g.detach() for g in gradients)


def release(ctx: Any, factor: Tensor) -> tuple[Tensor, ...]:
    """The saved gradients times the upstream factor: once, without a copy, unless the graph is to be used again."""
    saved: tuple[Tensor, ...] | None = ctx.known_gradients
    if saved is None:
        raise RuntimeError("Trying to backward through the graph a second time: pass retain_graph=True to the first.")
    traced = type(factor) is not Tensor  # a graph may not change in its backward what its forward gave
    if traced or _graph_is_kept():
        return tuple(g * factor.to(g.dtype) for g in saved)
    ctx.known_gradients = None
    for gradient in saved:
        if gradient.numel():
            scale_(gradient, factor)
    return saved


def _graph_is_kept() -> bool:
    """Whether the running backward was called with retain_graph=True. Where torch does not tell, assume so: a copy."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
