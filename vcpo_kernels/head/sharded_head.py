"""The weight and bias of a head that FSDP2 or ZeRO-3 shards: gathered for a call of the fused head and for its backward.

Layer: rows. Both gather a module's parameters for its forward and its backward; the fused head works between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vcpo_kernels.parallel import fully_sharded

Operands = tuple[Tensor, Tensor | None]
Work = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]  # of hidden, weight, bias


class ShardedHead:
    """Neither a dataclass nor a pytree, so that FSDP2 finds no parameter among a model's outputs: it would put a hook on it in
    each forward, for good, and cast all of it to output_dtype.

    dtype: that the hidden states have for the head.
    """

    def __init__(self, head: nn.Module, units: set[Any], operands: Callable[[], Operands], dtype: torch.dtype) -> None:
        self._head, self._units, self._operands, self.dtype = head, units, operands, dtype

    @staticmethod
    def units_of(model: nn.Module, head: nn.Module) -> set[Any]:
        """Those that gather the head's parameters."""
        units = fully_sharded.units_of(model)
        return {units[module] for module in head.modules() if module in units}

    def of(self, dtype: torch.dtype) -> ShardedHead:
        return ShardedHead(self._head, self._units, self._operands, dtype)

    def run(self, hidden: Tensor, work: Work) -> tuple[Tensor, ...]:
        """What `work` makes of the whole weight, which is there again in its backward."""
        with fully_sharded.gathered(self._units, self._head.parameters()):
            outputs = work(hidden, *self._operands())
        self.gather_in_backward_of(*outputs)
        return outputs

    def gather_in_backward_of(self, *outputs: Tensor) -> None:
        """Before the backward of these, which may read the weight, it is gathered; FSDP2 reshards it after."""

        def gather(grad: Tensor) -> None:
            fully_sharded.gather(self._units)

        for output in outputs:
            if output.requires_grad:
                output.register_hook(gather)


class CalledHead:
    """A head whose parameters are gathered by hooks around its calls, as DeepSpeed's ZeRO-3 does: the work is done in one."""

    def __init__(self, head: nn.Module, operands: Callable[[], Operands], dtype: torch.dtype) -> None:
        self._head, self._operands, self.dtype = head, operands, dtype

    @staticmethod
    def gathers(head: nn.Module) -> bool:
        return any(hasattr(p, "ds_id") for p in head.parameters())

    def of(self, dtype: torch.dtype) -> CalledHead:
        return CalledHead(self._head, self._operands, dtype)

    def run(self, hidden: Tensor, work: Work) -> tuple[Tensor, ...]:
        def forward(given: Tensor) -> tuple[Tensor, ...]:
            return work(given, *self._operands())

        before = self._head.__dict__.get("forward")
        self._head.__dict__["forward"] = forward
        try:
            outputs: tuple[Tensor, ...] = self._head(hidden)
            return outputs
        finally:
            if before is None:
                del self._head.__dict__["forward"]
            else:
                self._head.__dict__["forward"] = before


def asking(hidden: Tensor, units: set[Any], *parameters: Tensor | None) -> Tensor:
    """hidden, which asks for a gradient wherever the head's parameters do: by that FSDP2 knows of a backward."""
    wanted = bool(units) and torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    return hidden.clone().requires_grad_() if wanted and not hidden.requires_grad else hidden
