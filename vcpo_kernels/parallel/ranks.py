"""Who shares what: the process groups of a training job, by what its ranks hold.

Layer: process groups. The engines (torch.distributed, DeviceMesh, FSDP2, DeepSpeed, Megatron) make the groups; what crosses
each of them is in docs/parallel.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check

# What torchtitan, accelerate, transformers, verl and Megatron call the dimensions of their meshes.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "data": ("dp", "dp_replicate", "dp_shard", "fsdp", "ddp", "batch"),
    "sequence": ("cp", "sp", "ulysses"),
    "vocabulary": ("tp",),
}
WITHOUT_SUMS = ("pp", "ep")  # pipeline stages and experts: every token is still on one of their ranks


@dataclass(frozen=True)
class Ranks:
    """Process groups of this rank, None where nobody shares with it.

    data: ranks that hold other sequences of the same step. sequence: other tokens of the same sequences (context
    parallelism, Ulysses). vocabulary: other entries of the same rows of logits (tensor parallelism).

    averaged: gradients are averaged over data and sequence ranks (DistributedDataParallel, FSDP). A loss is this rank's
    share, whose gradient is to be summed over them; with averaged=True it is multiplied by their number, so that the
    average is that sum.
    uneven: data ranks may hold different numbers of sequences. Their numbers are then gathered first, one collective more,
    and read on the host, which torch.compile cannot trace. Where they differ and this is False, the collective fails.

    Raises TypeError for what is no process group.

    >>> import vcpo_kernels as vk
    >>> vk.Ranks(averaged=True).loss_factor
    1
    """

    data: Any = None
    sequence: Any = None
    vocabulary: Any = None
    averaged: bool = False
    uneven: bool = False

    def __post_init__(self) -> None:
        check = Check("Ranks")
        for name in DIMENSIONS:
            check_group(check, name, getattr(self, name))
        for switch in ("averaged", "uneven"):
            check.boolean(switch, getattr(self, switch))

    @staticmethod
    def of(mesh: Any, averaged: bool = False, uneven: bool = False) -> Ranks:
        """The groups of a torch.distributed DeviceMesh, by the names of its dimensions (`DIMENSIONS`).

        Several dimensions of one kind (dp_replicate and dp_shard) are taken together, which makes a group of them: a call
        that all ranks make. Raises TypeError or ValueError for a mesh without names, or with names that are not known.
        """
        check = Check("Ranks.of")
        names = getattr(mesh, "mesh_dim_names", None)
        if not hasattr(mesh, "get_group"):
            raise check.type_error(f"mesh must be a torch.distributed DeviceMesh, got {checks.describe(mesh)}.")
        if not names:
            raise check.value_error(
                "mesh must have named dimensions, got one without names. init_device_mesh(..., mesh_dim_names=('dp', 'tp')), "
                "or pass the groups by hand: Ranks(data=..., sequence=..., vocabulary=...)."
            )
        known = {name for of_kind in DIMENSIONS.values() for name in of_kind}.union(WITHOUT_SUMS)
        if unknown := [name for name in names if name not in known]:
            raise check.value_error(
                f"mesh must have dimensions of {', '.join(sorted(known))}, got {', '.join(map(repr, unknown))} too. "
                "Pass the groups by hand: Ranks(data=mesh['...'].get_group(), ...)."
            )
        groups = {kind: _group_of(mesh, [n for n in names if n in of]) for kind, of in DIMENSIONS.items()}
        return Ranks(**groups, averaged=averaged, uneven=uneven)

    @property
    def loss_factor(self) -> int:
        """What this rank's share of a loss is multiplied by: the number of ranks that gradients are averaged over, or 1."""
        return size_of(self.data) * size_of(self.sequence) if self.averaged else 1


def _group_of(mesh: Any, names: list[str]) -> Any:
    if not names:
        return None
    return (mesh[names[0]] if len(names) == 1 else mesh[tuple(names)]._flatten()).get_group()


def check_group(check: Check, name: str, group: Any) -> None:
    """Raise unless it is a process group or None."""
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    fix = "Of a DeviceMesh: mesh['dp'].get_group(), or Ranks.of(mesh)." if hasattr(group, "get_group") else ""
    raise check.type_error(
        f"{name} must be a torch.distributed process group or None, got {checks.describe(group)}. {fix}"
    )


def check_ranks(check: Check, ranks: object) -> None:
    """Raise unless it is a Ranks."""
    if not isinstance(ranks, Ranks):
        raise check.type_error(f"ranks must be a Ranks, got {checks.describe(ranks)}. Make one: Ranks.of(mesh).")


def world() -> Any:
    """The group of all processes; None where a process is by itself."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def size_of(group: Any) -> int:
    """Ranks in a group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)
