"""Segments: which tokens belong to which sequence, for padded, packed and indexed batches.

Layer: tokens [N] -> sequences [B]. All three layouts come down to the same few tensors, so every kernel has one form:
sequence i owns the flat positions order[offsets[i] : offsets[i + 1]] (order None: the positions themselves), of which the
mask says which count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.trees import TensorTree
from vcpo_kernels.parallel.collectives import summed
from vcpo_kernels.parallel.ranks import check_group, size_of
from vcpo_kernels.rows.token_stats import TokenStats, is_shifted
from vcpo_kernels.sequences.segment_sum import segment_spread, segment_sum


def without_first(mask: Tensor | None, offsets: Tensor, num_tokens: int) -> Tensor:
    """mask [num_tokens] (None: all true) with the token at each of offsets[:-1] taken out. No synchronisation."""
    first = torch.zeros(num_tokens + 1, dtype=torch.bool, device=offsets.device)
    first[offsets[:-1].clamp(max=num_tokens)] = True  # an empty last sequence starts past the end
    return ~first[:-1] if mask is None else mask & ~first[:-1]


def check_segments(check: Check, segments: object) -> None:
    """Raise unless `segments` is a Segments: a bare mask is what callers pass by mistake."""
    if not isinstance(segments, Segments):
        raise check.type_error(
            f"segments must be a Segments, got {checks.describe(segments)}. Make one: Segments.padded(mask) "
            "for [B, T] batches, Segments.packed(cu_seqlens) or Segments.indexed(segment_id, num_sequences)."
        )


def check_seen(check: Check, segments: Segments, stats: TokenStats) -> Tensor | None:
    """How many tokens the segments count of which the statistics say nothing: an error on the CPU, elsewhere for a metric."""
    unseen = segments.unseen_tokens(stats)
    if unseen is not None and checks.readable(unseen) and int(unseen):
        raise check.value_error(
            f"segments count {int(unseen)} tokens that were masked when stats were taken, where logp is 0 and means nothing. "
            "Give Segments the same mask or a narrower one: Segments.padded(mask), Segments.packed(cu_seqlens, mask=mask)."
        )
    return unseen


@dataclass(frozen=True)
class Segments(TensorTree):
    """Sequences over a batch of tokens. Make one with `padded`, `packed` or `indexed`.

    mask: flat bool [N], true where a token counts; None: all do.
    offsets: int64 [B + 1], sequence i's range, clamped to N by every reader.
    order: int64 [N] flat positions sorted by sequence (indexed batches), or None where they are sorted already.
    shape: the shape token tensors must have; None (packed): any shape with as many elements.
    max_length: the longest that a sequence can be, where the layout tells (padded: T), else None.
    sequence_group: the process group of the ranks that hold other tokens of the same sequences (context parallelism), each
        in its own segments of as many sequences; sums, means and lengths are then of whole sequences, on every rank, by one
        all-reduce each. None: this rank has them whole.
    """

    STATIC = ("shape", "max_length", "sequence_group")

    mask: Tensor | None
    offsets: Tensor
    order: Tensor | None
    shape: tuple[int, ...] | None
    max_length: int | None
    sequence_group: Any = None

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Valid tokens of each sequence, |T_i|: float32 [B]."""
        if self.mask is None:
            return summed(torch.diff(self.offsets).float(), self.sequence_group)
        return self.reduce(self.mask.float())

    def mask_without_first(self, num_tokens: int) -> Tensor:
        """The flat mask less each sequence's first token, which `shift=True` has no prediction for.

        Indexed tokens lose the first of each row alone: what precedes any other (a shared prefix) is not for the
        segments to know.
        """
        if self.order is None:
            return without_first(self.mask, self.offsets, num_tokens)
        row = self.shape[-1] if self.shape else 1
        rows = torch.arange(0, num_tokens + 1, max(row, 1), device=self.offsets.device)
        return without_first(self.mask, rows, num_tokens)

    def seen_by(self, stats: TokenStats) -> Segments:
        """These segments less the tokens that `stats` says nothing of: its sums, means and lengths are of those that are left.

        Left out are what was masked when the statistics were taken and, where they were shifted, each sequence's first token.

        >>> import torch, vcpo_kernels as vk
        >>> stats = vk.token_stats(torch.zeros(5, 3)[None], torch.zeros(1, 5, dtype=torch.long), shift=True)
        >>> vk.Segments.packed(torch.tensor([0, 2, 5])).seen_by(stats).lengths
        tensor([1., 2.])
        """
        seen = self.less_masked(stats)
        return seen.less_first(stats.logp.numel()) if stats.shifted else seen

    def _masked_by(self, mask: Tensor) -> Segments:
        return Segments(mask, self.offsets, self.order, self.shape, self.max_length, self.sequence_group)

    def less_first(self, num_tokens: int) -> Segments:
        """Less what a shifted pass over these num_tokens has no prediction for.

        Raises ValueError where sequences are split over ranks: such a pass lacks each part's first token.
        """
        if size_of(self.sequence_group) > 1:
            raise Check("Segments").value_error(
                "statistics were taken with shift=True, but sequences are split over ranks (sequence_group), and a part's "
                "first token was predicted on another rank. Shift the labels before they are split, and take statistics "
                "with shift=False."
            )
        return self._masked_by(self.mask_without_first(num_tokens))

    def of_this_rank(self) -> Segments:
        """These segments' tokens on this rank alone."""
        return Segments(self.mask, self.offsets, self.order, self.shape, self.max_length)

    def less_masked(self, stats: TokenStats) -> Segments:
        """These segments less the tokens that were masked when the statistics were taken."""
        if stats.mask is None or self._has_mask_of(stats):
            return self
        masked = stats.mask.reshape(-1)
        return self._masked_by(masked if self.mask is None else self.mask & masked)

    def unseen_tokens(self, stats: TokenStats) -> Tensor | None:
        """How many tokens count here that were masked when the statistics were taken, 0-d; None where none can be."""
        if stats.mask is None or self._has_mask_of(stats):
            return None
        return (self.valid(stats.logp.numel()) & ~stats.mask.reshape(-1)).sum()

    def _has_mask_of(self, stats: TokenStats) -> bool:
        """Whether both were given one mask, as they mostly are: nothing has to be compared then."""
        if self.mask is None or stats.mask is None or torch.compiler.is_compiling():
            return False
        same = (self.mask.data_ptr(), self.mask.numel()) == (stats.mask.data_ptr(), stats.mask.numel())
        return same and self.mask.is_contiguous() and stats.mask.is_contiguous()

    @staticmethod
    def padded(mask: Tensor, sequence_group: Any = None) -> Segments:
        """Sequences as rows of a padded batch.

        mask: [B, T], true (or 1) where a token counts, normally the response tokens.
        sequence_group: see `Segments`; also of the other two.

        Raises TypeError or ValueError for anything else.

        >>> import torch, vcpo_kernels as vk
        >>> seg = vk.Segments.padded(torch.tensor([[1, 1, 0], [1, 0, 0]]))
        >>> seg.sum(torch.tensor([[0.5, 1.0, 9.0], [2.0, 9.0, 9.0]]))
        tensor([1.5000, 2.0000])
        """
        check = Check("Segments.padded")
        mask = check.mask("mask", mask)
        if mask.dim() != 2:
            raise check.value_error(
                f"mask must be [B, T], got {checks.describe(mask)}. For flat tokens use Segments.packed or .indexed."
            )
        batch, length = mask.shape
        offsets = torch.arange(batch + 1, device=mask.device) * length
        check_group(check, "sequence_group", sequence_group)
        return Segments(mask.reshape(-1), offsets, None, (batch, length), length, sequence_group)

    @staticmethod
    def packed(cu_seqlens: Tensor, mask: Tensor | None = None, sequence_group: Any = None) -> Segments:
        """Sequences end to end in one row of tokens, as varlen attention has them.

        cu_seqlens: int32 or int64 [B + 1], ascending from 0; sequence i owns tokens cu_seqlens[i] to cu_seqlens[i + 1].
            Tokens past the last entry (padding to a multiple) belong to no sequence.
        mask: [N] or [1, N], true where a token counts. With `shift=True` the first token of each sequence has no
            prediction of its own and belongs outside.

        Raises TypeError or ValueError for a wrong dtype or shape and, on the CPU, for entries that do not ascend from 0.

        >>> import torch, vcpo_kernels as vk
        >>> vk.Segments.packed(torch.tensor([0, 2, 5])).sum(torch.ones(5))
        tensor([2., 3.])
        """
        check = Check("Segments.packed")
        check.tensor("cu_seqlens", cu_seqlens, checks.ID_DTYPES, "Convert it: torch.as_tensor(cu_seqlens).long().")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise check.value_error(f"cu_seqlens must be [B + 1], got {checks.describe(cu_seqlens)}.")
        if checks.readable(cu_seqlens) and (int(cu_seqlens[0]) != 0 or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any())):
            raise check.value_error(
                f"cu_seqlens must ascend from 0, got {cu_seqlens.tolist()[:8]}... "
                "From lengths: torch.nn.functional.pad(lengths.cumsum(0), (1, 0))."
            )
        shape = None
        if mask is not None:
            mask = check.mask("mask", mask)
            check.same_device("mask", mask, "cu_seqlens", cu_seqlens)
            if mask.dim() == 0 or mask.numel() != mask.shape[-1]:
                raise check.value_error(
                    f"mask must be [N] or [1, N], one row of tokens as cu_seqlens counts them, "
                    f"got {checks.describe(mask)}. For a padded batch use Segments.padded(mask)."
                )
            if checks.readable(cu_seqlens) and int(cu_seqlens[-1]) > mask.numel():
                raise check.value_error(
                    f"cu_seqlens ends at {int(cu_seqlens[-1])} but mask has only {mask.numel()} tokens."
                )
            shape = (mask.numel(),)
            mask = mask.reshape(-1)
        check_group(check, "sequence_group", sequence_group)
        return Segments(mask, cu_seqlens.to(torch.int64), None, shape, None, sequence_group)

    @staticmethod
    def indexed(
        segment_id: Tensor, num_sequences: int, mask: Tensor | None = None, sequence_group: Any = None
    ) -> Segments:
        """Tokens in any order, each with the number of its sequence (prefix-tree-packed rows, shuffled micro-batches).

        segment_id: integers, any shape; -1 marks a token of no sequence.
        num_sequences: B; ids are below it.
        mask: the shape of segment_id, true where a token counts.

        Raises TypeError or ValueError for a wrong dtype or shape and, on the CPU, for ids outside [-1, num_sequences).

        >>> import torch, vcpo_kernels as vk
        >>> vk.Segments.indexed(torch.tensor([1, 0, 1, -1]), 2).sum(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        tensor([2., 5.])
        """
        check = Check("Segments.indexed")
        check.tensor("segment_id", segment_id, checks.ID_DTYPES, "Convert it: torch.as_tensor(segment_id).long().")
        num_sequences = check.integer("num_sequences", num_sequences, 0)
        ids = segment_id.reshape(-1)
        if checks.readable(ids) and ids.numel() and bool(((ids < -1) | (ids >= num_sequences)).any()):
            raise check.value_error(
                f"segment_id must lie in [-1, {num_sequences}), got values from {int(ids.min())} to "
                f"{int(ids.max())}. Raise num_sequences, or mark tokens of no sequence with -1."
            )
        if mask is not None:
            mask = check.mask("mask", mask)
            check.shape("mask", mask, segment_id.shape, "segment_id.shape")
            check.same_device("mask", mask, "segment_id", segment_id)
            mask = mask.reshape(-1)
        last = torch.where((ids < 0) | (ids >= num_sequences), num_sequences, ids.to(torch.int64))
        in_order, order = torch.sort(last, stable=True)
        bounds = torch.arange(num_sequences + 1, device=ids.device)
        check_group(check, "sequence_group", sequence_group)
        offsets = torch.searchsorted(in_order, bounds)
        return Segments(mask, offsets, order, tuple(segment_id.shape), None, sequence_group)

    def flat(self, check: Check, name: str, value: Any) -> Tensor:
        """A token tensor as [N], after checking that it belongs to these segments."""
        check.tensor(name, value)
        check.same_device(name, value, "segments", self.offsets)
        if self.shape is not None:
            # [N] and [1, N] are the same tokens; anything else must match dimension by dimension.
            if [n for n in value.shape if n != 1] != [n for n in self.shape if n != 1]:
                raise check.value_error(
                    f"{name} must have the segments' shape {self.shape}, got {checks.describe(value)}."
                )
        elif checks.readable(self.offsets) and value.numel() < int(self.offsets[-1]):
            raise check.value_error(
                f"{name} must hold the {int(self.offsets[-1])} tokens that cu_seqlens spans, "
                f"got {checks.describe(value)}."
            )
        return value if value.dim() == 1 else value.reshape(-1)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each sequence's valid tokens: [B] from a token tensor. Accumulated in float64; differentiable.

        Masked-out tokens contribute exactly nothing, whatever they hold (NaN and inf included). Of a shifted pass's own
        statistics (`stats.logp`), each sequence's first token, which has none, is left out too; of anything computed from
        them it is not, unless the sum is `segments.seen_by(stats)`'s.
        """
        check = Check("Segments.sum")
        check.tensor("values", values, checks.FLOAT_DTYPES, "Convert it: values.float(). Of a TokenStats pass a field.")
        flat = self.flat(check, "values", values)
        return self.predicted_by(values).reduce(flat)

    def spread(self, per_sequence: Tensor, like: Tensor | None = None) -> Tensor:
        """The adjoint of `sum`: [B] written to each sequence's valid tokens, 0 elsewhere. Differentiable.

        like: a token tensor whose shape the result takes. None: the shape of the mask (or segment_id) given at the start,
        which packed segments without a mask do not have.

        >>> import torch, vcpo_kernels as vk
        >>> vk.Segments.padded(torch.tensor([[1, 1, 0], [1, 0, 0]])).spread(torch.tensor([0.5, 2.0]))
        tensor([[0.5000, 0.5000, 0.0000],
                [2.0000, 0.0000, 0.0000]])
        """
        check = Check("Segments.spread")
        check.tensor("per_sequence", per_sequence, checks.FLOAT_DTYPES, "Convert it: per_sequence.float().")
        check.shape("per_sequence", per_sequence, (self.num_sequences,), "one value per sequence")
        check.same_device("per_sequence", per_sequence, "segments", self.offsets)
        if like is not None:
            self.flat(check, "like", like)
        shape = self.shape if like is None else tuple(like.shape)
        if shape is None:
            raise check.value_error(
                "packed segments without a mask do not know how many tokens there are. Pass like=stats.logp."
            )
        return self.expand(per_sequence, math.prod(shape)).view(shape)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each sequence's valid tokens, [B]; 0 for a sequence without any. Differentiable."""
        return self.sum(values) / self.predicted_by(values).lengths.clamp(min=1)

    def predicted_by(self, values: Tensor) -> Segments:
        """Less each sequence's first token, where these values come from a shifted pass, which has no prediction for it."""
        return self.less_first(values.numel()) if is_shifted(values) else self

    def reduce(self, values: Tensor) -> Tensor:
        """`sum` of flat values [N] that are known to belong here: [B]."""
        return summed(segment_sum(values, *self.tensors), self.sequence_group)

    def expand(self, per_sequence: Tensor, num_tokens: int) -> Tensor:
        """`spread` to flat tokens: [B] -> [num_tokens]."""
        return segment_spread(per_sequence, *self.tensors, num_tokens)

    def valid(self, num_tokens: int) -> Tensor:
        """Which of the flat tokens count: bool [num_tokens]."""
        if self.max_length is not None and self.mask is not None:  # padded: every token is of a sequence
            return self.mask
        return (
            self.expand(torch.ones(self.num_sequences, dtype=torch.float32, device=self.offsets.device), num_tokens) > 0
        )

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """mask, offsets, order: what an op takes in place of these segments."""
        return self.mask, self.offsets, self.order
