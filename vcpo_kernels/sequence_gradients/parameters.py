"""A model's trainable parameters, known by the modules that hold them, whatever tensor stands there during a forward.

Layer: parameters. FSDP2 puts a gathered tensor in a sharded parameter's place while its module works: gradients belong to the
sharded one. Under tensor parallelism a rank has a part of a parameter's gradient: squared norms add up over the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.parallel import collectives, fully_sharded, tensor_parallel
from vcpo_kernels.parallel.tensor_parallel import Part
from vcpo_kernels.sequence_gradients.factors import ParameterGradient
from vcpo_kernels.sequence_gradients.model_checks import parts_of
from vcpo_kernels.sequence_gradients.over_sequence_ranks import Place
from vcpo_kernels.sequences.segments import Segments


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
        sharded = [p for p in self.names if checks.is_dtensor(p)]
        self.mesh: Any = sharded[0].device_mesh if sharded else None  # type: ignore[attr-defined]
        self._parts: dict[Tensor, Part] = {}
        self._vocabulary_groups: dict[Tensor, Any] = {}  # of plain tensors that a head was told to be shards
        self._stand_ins: dict[Tensor, Tensor] = {}
        self._head_units: set[Any] = set()

    def find_parts(self, check: Check) -> None:
        """Which parts of the parameters this rank works with. Raises TypeError for a layout that no rule is known for."""
        self._parts = parts_of(check, self._model, self._units)

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
            if p is parameter and module in self._units and checks.is_dtensor(p)
        }

    def gather_heads(self) -> None:
        fully_sharded.gather(self._head_units)

    def release_heads(self) -> None:
        fully_sharded.reshard(self._head_units)
        self._head_units.clear()

    # --- over the ranks -----------------------------------------------------------------------------------------------------

    def part(self, module: nn.Module, name: str) -> Part | None:
        """What this rank has of a module's parameter (frozen or not) while it works; None: all, and no other rank shares it."""
        parameter = module._parameters.get(name)
        own = self._places.get((module, name), parameter)
        return None if own is None else self._parts.get(own)

    def note_vocabulary(self, parameter: Tensor, group: Any) -> None:
        """A head was given this parameter as the shard of a vocabulary."""
        if parameter not in self._parts:
            self._vocabulary_groups[parameter] = group

    def groups(self, segments: Segments) -> list[Any]:
        """Of ranks that work on the same sequences: their backwards are one, and so are their errors."""
        of_parts = dict.fromkeys(part.group for part in self._parts.values())
        heads = dict.fromkeys(self._vocabulary_groups.values())
        own = [segments.sequence_group] if segments.sequence_group is not None else []
        return list(dict.fromkeys([*of_parts, *heads, *own]))

    def largest(self, number: int, segments: Segments) -> int:
        """The largest of the ranks' numbers, where a backward is one that all of them take part in."""
        groups = self.groups(segments)
        if self.mesh is not None:
            groups = list(dict.fromkeys([*(self.mesh.get_group(d) for d in range(self.mesh.ndim)), *groups]))
        value = torch.tensor(number, device=segments.offsets.device)
        for group in groups:
            value = collectives.largest(value, group)
        return int(value) if groups else number

    def place_of(self, parameter: Tensor) -> Place:
        shape = tensor_parallel.shape_of(parameter, self._parts.get(parameter))
        return Place(self.names[parameter], shape, parameter.device)

    def over_parts(self, check: Check, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared norms [B] of whole parameters, from those of this rank's parts. One all-reduce over each group.

        What ranks have whole is checked to be the same on all of them, where that can be read: a gradient that each has a
        part of looks no different.
        """
        parts = {self.names[p]: part for p, part in self._parts.items() if p in self.names}
        groups = {part.group: part for part in parts.values()}
        split = {name: part.group for name, part in parts.items() if part.dim is not None}
        split |= {self.names[p]: group for p, group in self._vocabulary_groups.items()}
        for group in dict.fromkeys([*groups, *split.values()]):
            shared = [name for name in norms if split.get(name) is group]
            alike = [name for name in norms if name not in split] if group in groups else []
            rows = [norms[name] for name in (*shared, *alike)]
            squares = [norms[name].square() for name in alike]
            found = collectives.summed(torch.stack([*rows, *squares]), group)
            norms |= dict(zip(shared, found, strict=False))
            if alike and checks.readable(found):
                mean, square = (t / dist.get_world_size(group) for t in found[len(shared) :].split(len(alike)))
                _check_alike(check, alike, mean, square)
        return norms

    @torch.no_grad()
    def add(self, parameter: Tensor, parts: list[tuple[ParameterGradient, Tensor]]) -> None:
        """parameter.grad += sum_i c_i gradient_i of each part (gradient, c). Of one that FSDP2 shards, the mean over the ranks,
        all of which call this.
        """
        part = self._parts.get(parameter)
        given: Any = parameter
        if not checks.is_dtensor(parameter):
            fresh = parameter.grad is None
            if parameter.grad is None and parts:
                parameter.grad = torch.empty_like(parameter)
            _add_all(parameter.grad, parts, fresh)
            return
        if part is not None and part.mesh.ndim == given.device_mesh.ndim:
            local, fresh = tensor_parallel.local_gradient(parameter)
            _add_all(local, parts, fresh)
            return
        whole = torch.empty(tensor_parallel.shape_of(given, part), dtype=parameter.dtype, device=parameter.device)
        _add_all(whole, parts, True)
        mean = fully_sharded.averaged(whole, parameter)
        parameter.grad = mean if parameter.grad is None else parameter.grad.add_(mean)


def _add_all(grad: Tensor | None, parts: list[tuple[ParameterGradient, Tensor]], fresh: bool) -> None:
    """grad += the weighted sums of `parts`. fresh: grad holds nothing yet."""
    if grad is None:
        return
    if fresh and not parts:
        grad.zero_()
    for k, (gradient, c) in enumerate(parts):
        gradient.add_to(grad, c.to(grad.device), fresh and k == 0)


# What differs between ranks that all have it whole: the order of a sum's additions. A part of a gradient differs in its size.
_ALIKE = 0.05
_NOISE = 1e-10  # of all squared norms: rounding, where the gradient itself is 0


def _check_alike(check: Check, names: list[str], mean: Tensor, square: Tensor) -> None:
    """mean, square [K, B]: of the ranks' norms and of their squares."""
    spread = (square - mean.square()).clamp(min=0).sqrt()
    differ = ((spread > _ALIKE * mean) & (mean > _NOISE * mean.sum(0))).any(1)
    if bool(differ.any()):
        name = names[int(differ.nonzero()[0])]
        raise check.runtime_error(
            f"the gradient of parameter {name!r}, which every rank has whole, is not the same on the ranks of the tensor "
            "parallel group: each has a part of it (a norm over heads or tokens that are split), and nothing says so, or "
            "dropout draws other masks on each. Put its module into the plan: SequenceParallel(sequence_dim=...) of "
            "parallelize_module, or transformers' 'replicated_with_grad_allreduce'."
        )
