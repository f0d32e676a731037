"""FSDP2 (`fully_shard`): which modules gather a parameter, and its gradient from one that was formed outside of FSDP2.

Layer: process groups. A unit is a module that `fully_shard` was given: the nearest one around a parameter's module gathers it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from vcpo_kernels.core import checks


def units_of(model: nn.Module) -> dict[nn.Module, Any]:
    """The unit of every module inside `model` that has one inside `model`."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch without distributed, or before FSDP2 had this name
        return {}
    found: dict[nn.Module, Any] = {}
    ahead: list[tuple[nn.Module, Any]] = [(model, None)]
    while ahead:
        module, around = ahead.pop()
        unit = module if isinstance(module, FSDPModule) else around
        if unit is not None and module not in found:
            found[module] = unit
        ahead += [(child, unit) for child in module.children()]
    return found


def shards_data(parameter: Any) -> bool:
    """Whether a DTensor is split over data ranks alone, as FSDP2 and HSDP do it: (replicated and) once, in the last dimension
    of its mesh. Under tensor parallelism a rank has a part of it in the forward too.
    """
    *replicated, last = parameter.placements
    return bool(last.is_shard() and len(replicated) < 2 and all(p.is_replicate() for p in replicated))


def averaged(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of the mean over the data ranks of `whole`, each rank's own, as FSDP2 leaves a gradient. Under tensor
    parallelism `whole` is of what FSDP2 gathers.

    One reduce-scatter (and, for HSDP, all-reduce): a call that all ranks make.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = parameter.device_mesh
    if shards_data(parameter):
        parts = DTensor.from_local(whole, mesh, [Partial("avg")] * mesh.ndim, run_check=False)
        return parts.redistribute(mesh, parameter.placements)
    data = mesh[mesh.mesh_dim_names[:-1]]
    parts = DTensor.from_local(whole, data, [Partial("avg")] * data.ndim, run_check=False)
    split = [*[Replicate()] * (data.ndim - 1), Shard(parameter.placements[data.ndim - 1].dim)]
    local = parts.redistribute(data, split).to_local()
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def gather(units: Iterable[Any]) -> None:
    """Have the parameters of units whole, until they are resharded. Nothing happens where they are; else all ranks call it."""
    for unit in units:
        unit.unshard()


def reshard(units: Iterable[Any]) -> None:
    """Leave this rank its parts."""
    for unit in units:
        unit.reshard()


@contextlib.contextmanager
def gathered(units: Iterable[Any], parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the parameters of these units are whole; afterwards as they were. parameters: as their modules have them now."""
    units = list(units)
    sharded = any(checks.is_dtensor(p) for p in parameters)
    gather(units)
    try:
        yield
    finally:
        if sharded:
            reshard(units)
