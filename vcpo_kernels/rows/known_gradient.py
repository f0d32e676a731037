"""scale_: a gradient that was taken before its upstream factor was known, times that factor. Costs a pass only if not 1.

Layer: rows. Shared by weighted_logp and linear_weighted_logp, whose forward has already computed the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.library import LIBRARY, qualified

LIBRARY.define("scale_(Tensor(a!) gradient, Tensor factor) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    registry.select("scale", gradient.device, gradient.dtype).forward(gradient, factor)


LIBRARY.impl("scale_", _scale_, "CompositeExplicitAutograd")
torch.library.register_fake(qualified("scale_"), lambda gradient, factor: None, lib=LIBRARY)


def hold(ctx: Any, *gradients: Tensor) -> None:
    """Keep gradients for the backward. Detached: an output held as it is would hold its own graph node alive."""
    ctx.held = tuple(g.detach() for g in gradients)


def hand_out(ctx: Any, factor: Tensor) -> tuple[Tensor, ...]:
    """The held gradients times the upstream factor: once, without a copy, unless the graph is to be used again."""
    held: tuple[Tensor, ...] | None = ctx.held
    if held is None:
        raise RuntimeError("Trying to backward through the graph a second time: pass retain_graph=True to the first.")
    traced = type(factor) is not Tensor  # a graph may not change in its backward what its forward gave
    if traced or _graph_is_kept():
        return tuple(g * factor.to(g.dtype) for g in held)
    ctx.held = None
    for gradient in held:
        if gradient.numel():
            torch.ops.vcpo_kernels.scale_(gradient, factor)
    return held


def _graph_is_kept() -> bool:
    """Whether the running backward was called with retain_graph=True. Where torch does not tell, assume so: a copy."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
