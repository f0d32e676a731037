"""The torch.library namespace that all ops of this package are defined in: `torch.ops.vcpo_kernels.*`.

And the short way to an op: torch.library's layers in Python cost a call with gradients some 40 us, which is more than a small
batch's kernels take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "vcpo_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def qualified(name: str) -> str:
    """The name torch.library knows an op of ours by."""
    return f"{NAMESPACE}::{name}"


def _nobody_looks_on(arguments: tuple[Any, ...]) -> bool:
    """Whether these are plain tensors and nothing intercepts ops: no compiler, tracer, mode, functorch transform."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and all(
            not isinstance(a, Tensor) or (type(a) in (Tensor, torch.nn.Parameter) and not a.is_meta) for a in arguments
        )
    )


def short_way(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """The op `name`, called past the dispatcher where nobody looks on. The three functions are those registered with it."""

    def forward(ctx: Any, *arguments: Any) -> Any:  # with a setup_context of its own, a call inspects signatures: 40 us
        output = implementation(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if _nobody_looks_on(arguments):
            return function.apply(*arguments)
        return getattr(torch.ops.vcpo_kernels, name)(*arguments)

    return call
