"""The weight and bias of a head that FSDP2 shards, wherever it was put: gathered for a call and for its backward.

Layer: rows. FSDP2 gathers a unit's parameters for the forward and the backward of its modules; the fused head works between
the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vcpo_kernels.parallel import fully_sharded

Operands = tuple[Tensor, Tensor | None]


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

    @contextlib.contextmanager
    def whole(self) -> Iterator[Operands]:
        with fully_sharded.gathered(self._units, self._head.parameters()):
            yield self._operands()

    def gather_in_backward_of(self, *outputs: Tensor) -> None:
        """Before the backward of these, which may read the weight, it is gathered; FSDP2 reshards it after."""

        def gather(grad: Tensor) -> None:
            fully_sharded.gather(self._units)

        for output in outputs:
            if output.requires_grad:
                output.register_hook(gather)


def asking(hidden: Tensor, units: set[Any], *parameters: Tensor | None) -> Tensor:
    """hidden, which asks for a gradient wherever the head's parameters do: by that FSDP2 knows of a backward."""
    wanted = bool(units) and torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    return hidden.clone().requires_grad_() if wanted and not hidden.requires_grad else hidden
