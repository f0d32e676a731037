"""A model's trainable parameters, known by the modules that hold them, whatever tensor stands there during a forward.

Layer: parameters. FSDP2 puts a gathered tensor in a sharded parameter's place while its module works: gradients belong to the
sharded one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vcpo_kernels.parallel import fully_sharded
from vcpo_kernels.sequence_gradients.factors import ParameterGradient


class Parameters:
    """names: of each trainable parameter, in the model's order, which is the same on all ranks."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._units = model, fully_sharded.units_of(model)
        self.reshard()  # a forward without gradients leaves the root's gathered
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._places: dict[tuple[nn.Module, str], Tensor] = {
            (module, name): p
            for module in model.modules()
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad
        }
        sharded = [p for p in self.names if hasattr(p, "full_tensor")]
        self.mesh: Any = sharded[0].device_mesh if sharded else None  # type: ignore[attr-defined]
        self._stand_ins: dict[Tensor, Tensor] = {}
        self._head_units: set[Any] = set()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.names)

    def are_those_of(self, model: nn.Module) -> bool:
        self.reshard()
        return {p for p in model.parameters() if p.requires_grad} == set(self.names)

    def reshard(self) -> None:
        fully_sharded.reshard(set(self._units.values()))

    # --- who stands for whom ---------------------------------------------------------------------------------------------

    def at(self, module: nn.Module, name: str) -> Tensor:
        """The parameter of this name in this module."""
        return self._places[module, name]

    def own(self, tensor: Tensor) -> Tensor | None:
        """The parameter that this is, or stands for; None for others."""
        if tensor in self.names:
            return tensor
        return self._stand_ins.get(tensor)

    def stands_for(self, tensor: Tensor, module: nn.Module, name: str) -> bool:
        """Note what is found in a parameter's place. True where it is another tensor, seen for the first time."""
        if tensor in self.names or tensor in self._stand_ins:
            return False
        self._stand_ins[tensor] = self._places[module, name]
        return True

    def forget_stand_ins(self) -> None:
        self._stand_ins.clear()

    # --- a head's weight, which its logits are computed again of -----------------------------------------------------------

    def note_head(self, parameter: Tensor) -> None:
        self._head_units |= {
            self._units[module]
            for (module, _), p in self._places.items()
            if p is parameter and module in self._units and hasattr(p, "full_tensor")
        }

    def gather_heads(self) -> None:
        fully_sharded.gather(self._head_units)

    def release_heads(self) -> None:
        fully_sharded.reshard(self._head_units)
        self._head_units.clear()

    # --- over the ranks -----------------------------------------------------------------------------------------------------

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers, where a backward is one that all of them take part in."""
        if self.mesh is None:
            return number
        value = torch.tensor(number, device=self.mesh.device_type)
        for dimension in range(self.mesh.ndim):
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.mesh.get_group(dimension))
        return int(value)

    @torch.no_grad()
    def add(self, parameter: Tensor, parts: list[tuple[ParameterGradient, Tensor]]) -> None:
        """parameter.grad += sum_i c_i gradient_i of each part (gradient, c). Of a sharded one, the mean over the ranks, all of
        which call this.
        """
        if not hasattr(parameter, "full_tensor"):
            for gradient, c in parts:
                fresh = parameter.grad is None
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                gradient.add_to(parameter.grad, c.to(parameter.device), fresh)
            return
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if not parts:
            whole.zero_()
        for k, (gradient, c) in enumerate(parts):
            gradient.add_to(whole, c.to(whole.device), k == 0)
        mean = fully_sharded.averaged(whole, parameter)
        parameter.grad = mean if parameter.grad is None else parameter.grad.add_(mean)
