"""The head's score matrix: how d logits [M, V] is made, kept and had again.

Layer: rows. `score_chunks` makes scores on the way forward. Backward, d logits = row_factors * matrix, where the matrix is had
by blocks of the vocabulary: out of memory (`KeptScores`) or computed again (`RecomputedScores`). Who forms gradients of it, in
one sum or sequence by sequence, knows no more than `ByColumns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.dtypes import no_autocast, wide
from vcpo_kernels.head.chunks import BlockBuffer, entries_per_block, row_chunks
from vcpo_kernels.head.operands import Head, HeadInputs, at_positions
from vcpo_kernels.rows.statistics import RowStatistics

# --- forward ---------------------------------------------------------------------------------------------------------


class HeadStatistics(NamedTuple):
    """Of the computed rows, to be written: their statistics, and the sampled token's logit, each [M].

    A block of the vocabulary does not always hold that logit, and the backward needs it. None: nobody asks for it.
    """

    rows: RowStatistics
    target_logit: Tensor | None

    @classmethod
    def empty(cls, head: Head, with_targets: bool) -> HeadStatistics:
        target = (
            torch.empty(head.rows, dtype=wide(head.hidden.dtype), device=head.hidden.device) if with_targets else None
        )
        return cls(RowStatistics.empty((head.rows,), head.hidden), target)


def statistics_of(head: Head, chunk_bytes: int, into: HeadStatistics) -> None:
    """token_stats of all rows, chunk by chunk."""
    for rows, logits in row_chunks(head, chunk_bytes):
        _save_targets(head, logits, rows, into)
        backend = registry.select("token_stats", logits.device, logits.dtype, logits.shape[-1])
        _write(into, rows, backend.forward(logits[None], *_tokens(head, rows), **head.settings))


def score_(head: Head, logits: Tensor, rows: slice, coefficients: Tensor | None, into: HeadStatistics) -> None:
    """Statistics of logits [n, V], the head's `rows`; the logits become c d logp / d logits in the same pass (None: c = 1)."""
    _save_targets(head, logits, rows, into)
    backend = registry.select("score_rows", logits.device, logits.dtype, logits.shape[-1])
    c = None if coefficients is None else coefficients[None, rows]
    _write(into, rows, backend.forward(logits[None], logits[None], *_tokens(head, rows), c, **head.settings))


def score_chunks(
    head: Head, chunk_bytes: int, coefficients: Tensor | None, into: HeadStatistics
) -> Iterator[tuple[slice, Tensor]]:
    """The scores [n, V] of consecutive rows, in one reused buffer."""
    for rows, logits in row_chunks(head, chunk_bytes):
        score_(head, logits, rows, coefficients, into)
        yield rows, logits


def _tokens(head: Head, rows: slice) -> tuple[Tensor, Tensor | None]:
    return head.token_ids[None, rows], None if head.mask is None else head.mask[None, rows]


def _write(into: HeadStatistics, rows: slice, outputs: tuple[Tensor, ...]) -> None:
    for whole, part in zip(into.rows, outputs, strict=True):
        whole[rows] = part[0]


def _save_targets(head: Head, logits: Tensor, rows: slice, into: HeadStatistics) -> None:
    if into.target_logit is not None:
        ids = head.token_ids[rows].clamp(
            0, head.vocabulary - 1
        )  # an unknown id has a NaN logp, and must not fault here
        into.target_logit[rows] = logits.gather(1, ids[:, None])[:, 0].to(into.target_logit.dtype)


# --- backward --------------------------------------------------------------------------------------------------------


class ByColumns(Protocol):
    """A matrix [M, P] that is had by blocks of its columns: in memory, or computed when asked for."""

    @property
    def width(self) -> int:
        """P."""

    @property
    def step(self) -> int:
        """Columns that a block may have."""

    def block(self, columns: slice) -> Tensor:
        """[M, columns]; may be overwritten by the next call."""

    def selected(self, rows: Tensor) -> ByColumns:
        """Some rows only."""


def blocks_of(matrix: ByColumns) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive columns, and their block."""
    for begin in range(0, matrix.width, max(matrix.step, 1)):
        columns = slice(begin, min(begin + matrix.step, matrix.width))
        yield columns, matrix.block(columns)


@dataclass(frozen=True)
class Saved:
    """Of the rows with an upstream gradient, each [M]: what the forward saved, and the gradients to logp and entropy."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    target_logit: Tensor
    g: Tensor
    h: Tensor | None

    def selected(self, index: Tensor) -> Saved:
        logp, entropy, lse, target_logit, g = (
            t[index] for t in (self.logp, self.entropy, self.lse, self.target_logit, self.g)
        )
        return Saved(logp, entropy, lse, target_logit, g, None if self.h is None else self.h[index])


@dataclass(frozen=True)
class KeptScores:
    """d logp / d logits [M', V] in memory, of the rows of `index` (None: all)."""

    scores: Tensor
    index: Tensor | None
    chunk_bytes: int
    _buffer: BlockBuffer = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_buffer", BlockBuffer(self.scores))

    @property
    def width(self) -> int:
        return self.scores.shape[1]

    @property
    def step(self) -> int:
        return (
            self.width
            if self.index is None
            else entries_per_block(len(self.index), self.width, self.chunk_bytes, self.scores)
        )

    def block(self, columns: slice) -> Tensor:
        part = self.scores[:, columns]
        if self.index is None:
            return part
        return torch.index_select(part, 0, self.index, out=self._buffer.block(len(self.index), part.shape[1]))

    def selected(self, rows: Tensor) -> KeptScores:
        return KeptScores(self.scores, rows if self.index is None else self.index[rows], self.chunk_bytes)


@dataclass(frozen=True)
class RecomputedScores:
    """d logits, upstream gradients included, computed again block by block in one buffer of `chunk_bytes`."""

    head: Head
    saved: Saved
    chunk_bytes: int
    _buffer: BlockBuffer = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_buffer", BlockBuffer(self.head.hidden))

    @property
    def width(self) -> int:
        return self.head.vocabulary

    @property
    def step(self) -> int:
        return entries_per_block(self.head.rows, self.width, self.chunk_bytes, self.head.hidden)

    def block(self, columns: slice) -> Tensor:
        head, saved = self.head, self.saved
        out = self._buffer.block(head.rows, columns.stop - columns.start)
        backend = registry.select("token_stats", out.device, out.dtype)
        with no_autocast(out):
            head.logits(out, entries=columns)
        backend.backward(
            out[None], out[None], head.token_ids[None] - columns.start, _batched(head.mask),
            *(_batched(t) for t in (saved.logp, saved.entropy, saved.lse, saved.g, saved.h)),
            target_logits=_batched(saved.target_logit), **head.settings,
        )  # fmt: skip
        return out

    def selected(self, rows: Tensor) -> RecomputedScores:
        return RecomputedScores(self.head.selected(rows), self.saved.selected(rows), self.chunk_bytes)


def _batched(values: Tensor | None) -> Tensor | None:
    """[M] as the [1, M] that row kernels take."""
    return None if values is None else values.contiguous()[None]


@dataclass(frozen=True)
class ActiveRows:
    """The rows with an upstream gradient, of those that a forward computed.

    index: which of the forward's rows these are. positions: their flat indices into token_ids. None: all.
    """

    head: Head
    saved: Saved
    index: Tensor | None
    positions: Tensor | None

    def logits_gradient(self, kept: Tensor, chunk_bytes: int) -> LogitsGradient:
        """From the scores that the forward kept, or computed again: without any, and for a gradient through the entropy."""
        if self.saved.h is None and len(kept):
            return LogitsGradient(KeptScores(kept, self.index, chunk_bytes), self.saved.g)
        return LogitsGradient(RecomputedScores(self.head, self.saved, chunk_bytes), None)


@dataclass(frozen=True)
class LogitsGradient:
    """d logits [M, V] = row_factors [M] * matrix; None: 1."""

    matrix: ByColumns
    row_factors: Tensor | None

    def scaled(self, rows: Tensor) -> Tensor:
        """row_factors * rows [M, ..], in the rows' dtype: what the matrix is multiplied by, for d weight and d bias."""
        return rows if self.row_factors is None else (rows * self.row_factors[:, None]).to(rows.dtype)


def active_rows(
    inputs: HeadInputs,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    positions: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> ActiveRows:
    """saved: logp, entropy, lse, target_logit, as the gradients in the shape of token_ids. positions: of the forward's rows."""
    at = None if len(positions) == inputs.token_ids.numel() else positions
    valid = inputs.valid_tokens()

    def upstream(grad: Tensor | None) -> Tensor:
        grad = torch.zeros_like(saved[0]) if grad is None else grad
        return at_positions(grad if valid is None else torch.where(valid, grad, 0.0), at)

    head = inputs.gathered(at)
    logp, entropy, lse, target_logit = (at_positions(s, at) for s in saved)
    h = None if grad_entropy is None else upstream(grad_entropy)
    every = Saved(logp, entropy, lse, target_logit, upstream(grad_logp), h)
    index = None if inputs.captured else _rows_with_gradient(every)
    if index is None:
        return ActiveRows(head, every, None, at)
    return ActiveRows(head.selected(index), every.selected(index), index, index if at is None else at[index])


def _rows_with_gradient(saved: Saved) -> Tensor | None:
    """Indices [m] of the rows whose upstream gradient is not exactly 0; None where that is all of them."""
    active = saved.g != 0  # so is a NaN, which goes on to where it shows
    if saved.h is not None:
        active |= saved.h != 0
    index = active.nonzero().squeeze(1)
    return None if len(index) == len(active) else index
