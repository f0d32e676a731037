"""VocabularyShard: which entries of the vocabulary a rank holds.

Layer: process groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.parallel.ranks import check_group


def width_of(entries: int, start: int, size: int) -> int:
    """How many of a shard's entries are of the vocabulary, and no padding."""
    return max(0, min(size - start, entries))


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's entries of rows of logits, or of a head's weight, that the ranks of `group` share.

    group: the process group. start: this rank's first entry. size: how many entries the vocabulary has, all ranks together;
    entries of a shard from there on are padding and count nothing.

    Raises TypeError or ValueError, naming the argument.
    """

    group: Any
    start: int
    size: int

    def __post_init__(self) -> None:
        check = Check("VocabularyShard")
        if self.group is None:
            raise check.type_error("group must be a torch.distributed process group, got None.")
        check_group(check, "group", self.group)
        check.integer("start", self.start, 0)
        check.integer("size", self.size, 1)

    @staticmethod
    def even(group: Any, entries: int, size: int | None = None) -> VocabularyShard:
        """As Megatron splits a (padded) vocabulary: every rank of `group` holds as many entries, in the order of the ranks.

        entries: of this rank, logits.shape[-1] or weight.shape[0]. size: of the vocabulary before it was padded; None: of all
        shards together.
        """
        check = Check("VocabularyShard.even")
        entries = check.integer("entries", entries, 0)
        check_group(check, "group", group)
        whole = entries * dist.get_world_size(group)
        if size is not None and check.integer("size", size, 1) > whole:
            raise check.value_error(
                f"size must be at most the shards' {whole} entries ({entries} a rank), got {size}. It is the vocabulary's "
                "size before it was padded to be split."
            )
        return VocabularyShard(group, dist.get_rank(group) * entries, whole if size is None else size)

    @staticmethod
    def of_dtensor(tensor: Tensor, dim: int) -> VocabularyShard:
        """As a DTensor is sharded in its dimension `dim`, evenly or not. Raises ValueError where it is not, or twice."""
        from torch.distributed.tensor import Shard

        check = Check("VocabularyShard.of_dtensor")
        if not checks.is_dtensor(tensor):
            raise check.type_error(f"tensor must be a DTensor, got {checks.describe(tensor)}.")
        given: Any = tensor
        dim %= given.dim()
        at = [
            i for i, placement in enumerate(given.placements) if isinstance(placement, Shard) and placement.dim == dim
        ]
        if len(at) != 1:
            raise check.value_error(
                f"tensor must be sharded once in dimension {dim}, got placements {given.placements}. Redistribute it: "
                f"tensor.redistribute(mesh, [Shard({dim})])."
            )
        mesh, size = given.device_mesh, given.shape[dim]
        step = -(-size // mesh.size(at[0]))  # as torch.chunk: the last shards may be short, or empty
        start = min(mesh.get_local_rank(at[0]) * step, size)
        return VocabularyShard(mesh.get_group(at[0]), start, size)

    def width(self, entries: int) -> int:
        """How many of this rank's entries are of the vocabulary, and no padding."""
        return width_of(entries, self.start, self.size)


def is_sharded_in(tensor: Any, dim: int) -> bool:
    """Whether this is a DTensor that is sharded in its dimension `dim`, once, and replicated otherwise."""
    if not checks.is_dtensor(tensor):
        return False
    from torch.distributed.tensor import Replicate, Shard

    others = [p for p in tensor.placements if not isinstance(p, Replicate)]
    return len(others) == 1 and isinstance(others[0], Shard) and others[0].dim % tensor.dim() == dim % tensor.dim()
