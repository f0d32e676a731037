"""Ops: the torch.library namespace `torch.ops.vcpo_kernels.*`, and how one is defined.

`define_op` takes all that an op is (schema, implementation, fake, gradient) in one call, so that torch.compile, fake tensors,
`opcheck` and autograd know it.
"""

from __future__ import annotations

import re
import weakref
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
    twice: bool = False,
    bypass: bool = False,
) -> Op:
    """Define the op of a schema `name(arguments) -> returns`. Returns it, to be called by position.

    implementation: for real tensors of any device. fake: shapes and dtypes alone. setup_context, backward: its gradient;
    None: it has none. twice: the gradient may be differentiated again; otherwise that is an error. bypass: call it past the
    dispatcher where nothing intercepts the call (`bypass_dispatcher`).
    """
    name = schema.partition("(")[0]
    if backward is not None and not twice:
        assert setup_context is not None
        setup_context, backward = first_derivative_only(name, setup_context, backward)
    _register(schema, name, implementation, fake, setup_context, backward)
    op: Op = getattr(torch.ops.vcpo_kernels, name)
    if at := numbers_of(schema):
        twin = f"{name}.Tensor"
        _register(with_tensors(schema, twin), twin, reading(implementation, at), fake, setup_context, backward)
        op = with_changing_numbers(name, at)
    if bypass:
        assert setup_context is not None
        assert backward is not None
        op = bypass_dispatcher(name, op, implementation, setup_context, backward)
    return op


def _register(
    schema: str, name: str, implementation: Op, fake: Op, setup_context: SetupContext | None, backward: Backward | None
) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


# --- numbers that change under torch.compile: see core/changing.py -------------------------------------------------------


def numbers_of(schema: str) -> tuple[int, ...]:
    """Which of a schema's arguments are `float` or `float?`."""
    arguments = schema[schema.index("(") + 1 : schema.index(") ->")].split(", ")
    return tuple(i for i, argument in enumerate(arguments) if argument.startswith("float"))


def with_tensors(schema: str, name: str) -> str:
    """The schema of the overload `name`, which takes those as tensors: 0-d, float64, on the CPU."""
    return name + re.sub(r"\bfloat(\??) ", r"Tensor\1 ", schema[schema.index("(") :])


def reading(implementation: Op, at: tuple[int, ...]) -> Op:
    """An implementation that is given tensors for its numbers."""

    def implementation_of_tensors(*arguments: Any) -> Any:
        return implementation(*(a.item() if i in at and isinstance(a, Tensor) else a for i, a in enumerate(arguments)))

    return implementation_of_tensors


def with_changing_numbers(name: str, at: tuple[int, ...]) -> Op:
    """The op, or its overload for tensors: in a graph whose numbers may change, and in the backward of such a call."""
    ops = torch.ops.vcpo_kernels

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            arguments = _as_tensors(arguments, at)
        for i in at:
            if isinstance(arguments[i], Tensor):
                return getattr(ops, name).Tensor(*arguments)
        return getattr(ops, name)(*arguments)

    return call


def _as_tensors(arguments: tuple[Any, ...], at: tuple[int, ...]) -> tuple[Any, ...]:
    """All numbers as tensors where one may change; as they are otherwise."""
    from vcpo_kernels.core import changing

    given = [i for i in at if isinstance(arguments[i], float)]
    if not any(changing.may_change(arguments[i]) for i in given):
        return arguments
    return tuple(changing.as_tensor(a) if i in given else a for i, a in enumerate(arguments))


class _NoSecondDerivative(torch.autograd.Function):
    """The first `count` tensors as they are; a backward through them raises. The others are what they came from."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)


def first_derivative_only(name: str, setup_context: SetupContext, backward: Backward) -> tuple[SetupContext, Backward]:
    """The two, so that a further derivative is an error: kernels are constants to autograd, and it would silently be 0.

    As torch's once_differentiable, whose error however is lost where torch.autograd.grad is asked for chosen inputs: what it
    leaves does not depend on them. Inputs are remembered weakly, and where one is gone create_graph=True is refused at once.
    """
    message = (
        f"vcpo_kernels.{name} has no second derivative: its gradient cannot be differentiated again. For a gradient penalty or "
        "a Hessian use torch.log_softmax; otherwise leave create_graph=False."
    )

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)
        ctx.differentiable = [weakref.ref(x) for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def once(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():  # all but create_graph=True
            return backward(ctx, *grads)
        inputs = [ref() for ref in ctx.differentiable]
        if any(x is None for x in inputs):
            raise RuntimeError(message)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        at = [i for i, d in enumerate(outputs) if isinstance(d, Tensor)]
        guarded = dict(
            zip(at, _NoSecondDerivative.apply(message, len(at), *(outputs[i] for i in at), *inputs), strict=True)
        )
        return tuple(guarded.get(i, d) for i, d in enumerate(outputs))

    return remember, once


def bypass_dispatcher(name: str, op: Op, implementation: Op, setup_context: SetupContext, backward: Backward) -> Op:
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
        return op(*arguments)

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
