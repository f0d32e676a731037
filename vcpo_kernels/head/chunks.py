"""Pieces of the head's logits [M, V] that fit a buffer: chunks of rows forward, blocks of the vocabulary backward.

Layer: rows. Why the backward goes by vocabulary blocks: dW[v0:v1] is then finished by one GEMM over all rows, whose accumulator
is fp32 already. By chunks of rows every chunk would read and write an fp32 [V, H] (2.5 GB for V = 151936, H = 4096).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.head.operands import Head

CHUNK_BYTES = 256 << 20
ALIGN = 64  # entries: blocks of the vocabulary keep 16-byte accesses, and GEMM libraries their fast paths


def spans(total: int, step: int) -> Iterator[slice]:
    """[0, total) in equal pieces of at most `step`."""
    pieces = -(-total // max(step, 1))
    size = -(-total // max(pieces, 1))
    for begin in range(0, total, max(size, 1)):
        yield slice(begin, min(begin + size, total))


def rows_per_chunk(head: Head, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (head.vocabulary * head.hidden.element_size()))


def row_chunks(head: Head, chunk_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """The logits [n, V] of consecutive rows, in one reused buffer."""
    buffer = None
    for rows in spans(head.rows, rows_per_chunk(head, chunk_bytes)):
        count = rows.stop - rows.start
        buffer = empty_large((count, head.vocabulary), head.hidden) if buffer is None else buffer
        yield rows, head.logits(buffer[:count], rows)


def entries_per_block(rows: int, vocabulary: int, chunk_bytes: int, like: Tensor) -> int:
    """How many entries of the vocabulary a block [rows, entries] has: equal blocks, of whole ALIGNs where those fit."""
    most = max(1, chunk_bytes // (max(rows, 1) * like.element_size()))
    if most >= vocabulary:
        return max(vocabulary, 1)
    step = next(spans(vocabulary, most)).stop
    if most < ALIGN:
        return step
    aligned = -(-step // ALIGN) * ALIGN
    return aligned if aligned <= most else most // ALIGN * ALIGN


def empty_large(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory, in huge pages on a CPU: faults of 4 KiB cost more than the GEMM that fills it."""
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if out.device.type == "cpu" and registry.native_problem() is None:
        from vcpo_kernels import _native

        _native.prepare_if_fresh(out.data_ptr(), out.numel() * out.element_size())
    return out


class BlockBuffer:
    """Memory for one block [rows, entries] after the other, allocated once, at the first and largest."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._memory: Tensor | None = None

    def block(self, rows: int, entries: int) -> Tensor:
        """Overwrites the block before."""
        size = rows * entries
        if self._memory is None or self._memory.numel() < size:
            self._memory = empty_large((size,), self._like)
        return self._memory[:size].view(rows, entries)
