"""Capture: a module leaves its input and output gradient instead of forming its parameters' gradients.

Layer: tokens. Hooks swap a module's parameters for detached ones during its forward, so that autograd has no weight gradient to
form, and pass the output through an identity whose backward sees the output's gradient. Works under activation
checkpointing, since inputs are kept by `save_for_backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vcpo_kernels.head.traced_logits import TracedLogits
from vcpo_kernels.sequence_gradients.module_rules import CONV1D, EMBEDDING, LINEAR, Rule


def refuse_second_derivatives() -> None:
    """Raise in a backward under create_graph=True: what a gradient takes from detached parameters would be missing from it.

    torch's own once_differentiable raises only where the upstream gradient has a graph, and gives zeros elsewhere.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "SequenceGradients: there is no second derivative through the context (create_graph=True). Take gradients that "
            "are to be differentiated again outside of it."
        )


class _Identity(torch.autograd.Function):
    """The identity. Its backward hands the output's gradient over, and gives the parameters none.

    The parameters are inputs so that the output asks for a gradient even where nothing before it does.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, record: Callable[[Tensor, Tensor], None], *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.record, ctx.count = record, len(parameters)
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        (grad,) = grads
        if grad is not None:
            ctx.record(ctx.saved_tensors[0], grad)
        return (grad, *(None,) * (2 + ctx.count))


@dataclass
class Capture:
    """A module under its rule. record: called in the backward with (capture, input, output gradient). meet: called in the
    forward with (capture, name, what stands in the parameter's place).
    """

    module: nn.Module
    name: str
    rule: Rule
    deferred: tuple[str, ...]  # the module's own parameters that take part
    record: Callable[[Capture, Tensor, Tensor], None]
    meet: Callable[[Capture, str, Tensor], None]
    batch_shape: Callable[[], tuple[int, ...] | None]
    _swapped: dict[str, nn.Parameter | None] | None = None

    def install(self) -> list[Any]:
        """Hooks, to be removed by whoever installs them."""
        return [
            self.module.register_forward_pre_hook(self._swap),
            self.module.register_forward_hook(self._capture, prepend=True, with_kwargs=True, always_call=True),
        ]

    def _swap(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"SequenceGradients: {self.name} is called inside torch.compile, where no module can be captured. Call the "
                    "model uncompiled inside the context, or, where parameters are whole, use OPOBAccumulator."
                )
            self._swapped = {name: module._parameters[name] for name in self.deferred}
            for name, parameter in self._swapped.items():
                assert parameter is not None
                self.meet(self, name, parameter)
                module._parameters[name] = parameter.detach()  # type: ignore[assignment]

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        own, self._swapped = self._swapped, None
        if own is None:
            return output
        module._parameters.update(own)
        if output is None or isinstance(output, TracedLogits):  # the forward raised; linear_token_stats has the head's
            return output
        x, *others = (*args, *kwargs.values())
        if others or not isinstance(output, Tensor):
            raise RuntimeError(
                f"SequenceGradients: {self.name} ({type(module).__name__}) was called with more than its input, or returned "
                "more than its output: no rule says what its parameters' gradients are. Freeze them, or, where "
                "parameters are whole, use OPOBAccumulator."
            )
        output, x = self._own_row_each(output, x)
        if self.rule in (LINEAR, CONV1D) and x.dtype != output.dtype:
            x = x.to(output.dtype)  # under autocast, what a plain backward would keep
        return _Identity.apply(output, x.detach(), lambda x, g: self.record(self, x, g), *own.values())

    def _own_row_each(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Position embeddings are looked up once for all sequences: their gradients would arrive added up."""
        shape = self.batch_shape()
        if self.rule is EMBEDDING and shape is not None and shape[0] != 1 and x.shape in ((1, shape[1]), shape[1:]):
            return output.expand(*shape, output.shape[-1]), x.expand(shape)
        return output, x
