"""Ops: the torch.library namespace `torch.ops.vcpo_kernels.*`, and how one is defined.

`define_op` takes all that an op is (schema, implementation, fake, gradient) in one call, so that torch.compile, fake tensors,
`opcheck` and autograd know it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "vcpo_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Op = Callable[..., Any]
SetupContext = Callable[[Any, tuple[Any, ...], Any], None]  # (ctx, inputs, output), as of torch.autograd.Function
Backward = Callable[..., tuple[Any, ...]]  # (ctx, *upstream gradients) -> one per input


def nothing_returned(*arguments: Any) -> None:
    """The fake of an op that writes into an argument and returns nothing."""


def define_op(
    schema: str,
    implementation: Op,
    fake: Op,
    setup_context: SetupContext | None = None,
    backward: Backward | None = None,
    *,
    bypass: bool = False,
) -> Op:
    """Define the op of a schema `name(arguments) -> returns`. Returns it, to be called by position.

    implementation: for real tensors of any device. fake: shapes and dtypes alone. setup_context, backward: its gradient;
    None: it has none. bypass: call it past the dispatcher where nothing intercepts the call (`bypass_dispatcher`).
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        if bypass:
            assert setup_context is not None
            return bypass_dispatcher(name, implementation, setup_context, backward)
    op: Op = getattr(torch.ops.vcpo_kernels, name)
    return op


def bypass_dispatcher(name: str, implementation: Op, setup_context: SetupContext, backward: Backward) -> Op:
    """The op `name`, called past torch.library's Python layers where nothing intercepts the call.

    Those cost a call with gradients some 40 us, which is more than a small batch's kernels take. The three functions are
    those registered with the op.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:  # with a setup_context of its own, a call inspects signatures: 40 us
        output = implementation(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if not_intercepted(arguments):
            return function.apply(*arguments)
        return getattr(torch.ops.vcpo_kernels, name)(*arguments)

    return call


def not_intercepted(arguments: tuple[Any, ...]) -> bool:
    """Whether these are plain tensors and nothing sees ops go by: no compiler, tracer, mode, functorch transform."""
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
