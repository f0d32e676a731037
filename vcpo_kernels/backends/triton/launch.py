"""Launch parameters as data: one table entry per architecture, never tuned at run time.

Every entry is compiled ahead of time by `python -m benchmarks.aot`, which keeps the resulting
registers, spills and access widths in benchmarks/results/aot_triton.json.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

ACCESS_BYTES = 16  # the widest load and store a thread has
FUSION = True  # a * b + c in one instruction; said at every launch, because triton 3.10 changes the default


@dataclass(frozen=True)
class RowLaunch:
    """A program reads its row in blocks of [vectors, 32 * num_warps lanes, one 16-byte access].

    vectors: 16-byte accesses that each thread has in flight at once. num_warps: of a program, which is one
    row.
    """

    vectors: int
    num_warps: int

    @property
    def lanes(self) -> int:
        """Threads of a program, each of which keeps a row state of its own."""
        return 32 * self.num_warps


@dataclass(frozen=True)
class SequenceLaunch:
    """block: sequences, tokens or, for scale, elements that a program takes at a time."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class OuterLaunch:
    """A program of outer_sqnorm forms a [tile, tile] product, `depth` of the summed dimension at a time."""

    tile: int
    depth: int
    num_warps: int


@dataclass(frozen=True)
class Launches:
    """Everything one architecture needs."""

    forward: RowLaunch
    forward_softcap: RowLaunch
    backward: RowLaunch
    score: RowLaunch
    score_softcap: RowLaunch
    sequence: SequenceLaunch
    scale: SequenceLaunch
    outer: OuterLaunch
    outer_fp32: OuterLaunch


# Four 16-byte loads per thread keep 64 bytes x 1024 threads = 64 KB per multiprocessor in flight at 64
# registers a thread; Little's law asks for 3.35 TB/s x 0.7 us / 132 = 18 KB on an H100, of which a program
# that is busy with its sums has none. Small programs (4 warps) leave several per multiprocessor out of step
# with each other, so that some are always loading. The backward pass is a plain map, whose stores need no
# reply: half as many loads at a time do. The softcap's polynomial takes twice the registers per element, so
# its forward pass too has half the elements at a time.
#
# score_rows reads a row twice, and the second time is cheap only where the L2 cache still has it: rows of
# 151,936 bf16 entries, one per multiprocessor and taken in place, are 132 x 304 KB = 40 MB of an H100's 50 MB;
# two would be 80 MB. So there is one program per multiprocessor: 1024 threads of more than 32 registers let no
# second one in. That leaves a thread 64 registers, which the softcap keeps to without spills only at one load
# at a time; two at a time are 32 KB in flight. All of this is arithmetic, no GPU has measured it.
_COMMON = Launches(
    forward=RowLaunch(vectors=4, num_warps=4),
    forward_softcap=RowLaunch(vectors=2, num_warps=4),
    backward=RowLaunch(vectors=2, num_warps=4),
    score=RowLaunch(vectors=2, num_warps=32),
    score_softcap=RowLaunch(vectors=1, num_warps=32),
    sequence=SequenceLaunch(block=512, num_warps=4),
    scale=SequenceLaunch(block=4096, num_warps=8),
    outer=OuterLaunch(tile=64, depth=32, num_warps=4),
    outer_fp32=OuterLaunch(tile=64, depth=16, num_warps=8),  # multiplied without tensor cores: more registers each
)
LAUNCHES: dict[tuple[int, int], Launches] = {(8, 0): _COMMON, (9, 0): _COMMON, (10, 0): _COMMON}


def launches_for(capability: tuple[int, int]) -> Launches:
    """The newest architecture of the table that is not newer than this one; the oldest where all are."""
    older = [known for known in LAUNCHES if known <= capability]
    return LAUNCHES[max(older) if older else min(LAUNCHES)]


def launches(device: torch.device) -> Launches:
    """The entry for a device; the interpreter on CPU tensors runs the one for Hopper."""
    if device.type != "cuda":
        return LAUNCHES[(9, 0)]
    return launches_for(torch.cuda.get_device_capability(device))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments live on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def access_elements(rows: Tensor) -> int:
    """Elements in one 16-byte access."""
    return ACCESS_BYTES // rows.element_size()


def vector_length(*rows: Tensor) -> int:
    """Elements per access: 16 bytes' worth where each row of each tensor [O, I, V] starts on 16, else 1.

    Strides of dimensions of size 1 count too: a row alone is summed in the same order as in its batch, bit
    for bit.
    """
    width = access_elements(rows[0])
    aligned = all(r.data_ptr() % ACCESS_BYTES == 0 for r in rows)
    return width if aligned and all(s % width == 0 for r in rows for s in r.stride()[:2]) else 1


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the uint8 it is in memory, contiguous."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
