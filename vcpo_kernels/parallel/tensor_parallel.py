"""Tensor parallelism: which part of a parameter a rank has while its module works, and the activations beside it.

Layer: process groups. Parameters are DTensors, as torch's `parallelize_module` and transformers' `tp_plan` leave them.
Under FSDP2 as well, the last dimension of their mesh is the one that their modules work on; the others are gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vcpo_kernels.core import checks
from vcpo_kernels.parallel import fully_sharded

_TRANSFORMERS = (
    "transformers.distributed.tensor_parallel"  # each style puts a `tp_forward` around a module's own forward
)


@dataclass(frozen=True)
class Part:
    """Of a parameter that the ranks of `mesh`, of one dimension, share. dim: where it is split; None: each has all of it.

    This rank's entries there are [start, stop) of `size`.
    """

    mesh: Any
    dim: int | None
    start: int = 0
    stop: int = 0
    size: int = 0

    @property
    def group(self) -> Any:
        return self.mesh.get_group()

    def of_last_dimension(self, tensor: Any) -> Tensor:
        """These entries of the last dimension of activations: of a DTensor, or of a plain tensor that has them, or all."""
        if checks.is_dtensor(tensor):
            from torch.distributed.tensor import Shard

            local: Tensor = tensor.redistribute(self.mesh, [Shard(tensor.dim() - 1)]).to_local()
            return local
        part: Tensor = tensor if tensor.shape[-1] == self.stop - self.start else tensor[..., self.start : self.stop]
        return part


def whole(tensor: Any) -> Tensor:
    """All of a DTensor of activations, on every rank; a plain tensor as it is."""
    if not checks.is_dtensor(tensor):
        plain: Tensor = tensor
        return plain
    from torch.distributed.tensor import Replicate

    local: Tensor = tensor.redistribute(tensor.device_mesh, [Replicate()] * tensor.device_mesh.ndim).to_local()
    return local


def on_all_ranks(tensor: Any, mesh: Any) -> Any:
    """Activations that every rank has whole, as the DTensor that says so, by which the ranks' gradients are added up."""
    if checks.is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


def part_of(parameter: Any, gathers_data: bool) -> Part | None:
    """What a rank has of a DTensor while its module works. None: all of it, and no rank shares the work.

    gathers_data: FSDP2 gathers it. Raises ValueError where it is shared in a way that no rule of a module is known for.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    if gathers_data:
        if fully_sharded.shards_data(parameter):
            return None
        if mesh.ndim < 2 or not mesh.mesh_dim_names:
            raise ValueError
        mesh = mesh[mesh.mesh_dim_names[-1]]
    elif mesh.ndim != 1:
        raise ValueError
    last = placements[-1]
    if last.is_replicate():
        return Part(mesh, None)
    if not last.is_shard():
        raise ValueError
    dim, size = last.dim % parameter.dim(), parameter.shape[last.dim]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, [last])
    start = offset[dim] if shape[dim] else size
    return Part(mesh, dim, start, start + shape[dim], size)


def shape_of(parameter: Any, part: Part | None) -> tuple[int, ...]:
    """Of what a rank has while the parameter's module works."""
    shape = list(parameter.shape)
    if part is not None and part.dim is not None:
        shape[part.dim] = part.stop - part.start
    return tuple(shape)


def local_gradient(parameter: Any) -> tuple[Tensor, bool]:
    """This rank's part of the gradient of a parameter that tensor parallelism alone shares, to be written; True: it is new."""
    from torch.distributed.tensor import DTensor

    if parameter.grad is not None:
        if parameter.grad.placements != parameter.placements:  # what sequence parallelism leaves of a norm's is a part
            parameter.grad = parameter.grad.redistribute(parameter.device_mesh, parameter.placements)
        return parameter.grad.to_local(), False
    local = torch.empty_like(parameter.to_local())
    parameter.grad = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return local, True


# --- transformers' styles -------------------------------------------------------------------------------------------------


def style_of(module: nn.Module) -> str | None:
    """The name of the style whose forward transformers has put around this module's; None: none."""
    forward: Any = module.__dict__.get("forward")
    if not _is_styled(forward):
        return None
    style = _variables(forward).get("self")
    name: str = forward.__qualname__.partition(".")[0] if style is None else type(style).__name__
    return name


def forward_inside(module: nn.Module) -> Any:
    """A module's own forward, behind the one of transformers' tensor parallelism; None where it is its class's."""
    forward = module.__dict__.get("forward")
    while _is_styled(forward):
        forward = _variables(forward).get("original_forward")
    is_own = getattr(forward, "__func__", None) is type(module).forward
    return None if is_own else forward


def _is_styled(forward: Any) -> bool:
    return getattr(forward, "__module__", None) == _TRANSFORMERS and "original_forward" in _variables(forward)


def _variables(function: Any) -> dict[str, Any]:
    """What a function made inside another one has of it."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=True))


def group_of_heads(module: nn.Module) -> Any:
    """The ranks that transformers' style ReplicatedWithGradAllReduce adds a module's gradients up over; None: another style."""
    if style_of(module) != "ReplicatedWithGradAllReduce":
        return None
    adds = _variables(module.__dict__["forward"])["_all_reduce_grad"]
    return _variables(adds)["mesh"].get_group()


def sums_gradients(hook: Any) -> bool:
    """Whether this hook on a parameter is transformers', which adds up the ranks' parts of its gradient."""
    return getattr(hook, "__qualname__", "").startswith("ReplicatedWithGradAllReduce.")


@contextlib.contextmanager
def without_sums(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside, these hooks are not called: autograd does, in a backward that forms no gradient of the parameter either."""
    taken = []
    for parameter in parameters:
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        taken += [(hooks, key, hooks.pop(key)) for key, hook in list(hooks.items()) if sums_gradients(hook)]
    try:
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook
