"""Whose gradient a row of activations carries, and module tensors sorted by sequence.

Layer: tokens. A padded batch's row b is sequence b, prompt and padding included; in packed and indexed batches every
token has its sequence. The mask of the segments says which tokens a loss counts, which is another matter: prompts take
gradients too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.sequences.segments import Segments


@dataclass(frozen=True)
class Spans:
    """Consecutive rows of each sequence: sequence i has rows [offsets[i], offsets[i + 1]).

    max_length: the longest. equal: whether all have that many.
    """

    offsets: Tensor
    max_length: int
    equal: bool

    @property
    def num_sequences(self) -> int:
        return self.offsets.numel() - 1

    def sums(self, values: Tensor) -> Tensor:
        """values [R, d] summed over each sequence's rows: [B, d], fp32 or float64."""
        dtype = wide(values.dtype)
        if self.equal:
            return values.view(self.num_sequences, self.max_length, values.shape[-1]).sum(1, dtype=dtype)
        return torch.segment_reduce(values.to(dtype), "sum", offsets=self.offsets, unsafe=True)

    def largest(self, values: Tensor) -> Tensor:
        """The largest of values >= 0 [R] in each sequence: [B]."""
        if self.equal:
            return values.view(self.num_sequences, self.max_length).amax(1)
        return torch.segment_reduce(values, "max", offsets=self.offsets, initial=0.0, unsafe=True)

    def owners(self) -> Tensor:
        """The sequence of each row [R]."""
        sequences = torch.arange(self.num_sequences, device=self.offsets.device)
        return torch.repeat_interleave(sequences, torch.diff(self.offsets))

    @staticmethod
    def of(owners: Tensor, num_sequences: int) -> Spans:
        """From ascending owners [R]. Reads the longest length."""
        bounds = torch.arange(num_sequences + 1, device=owners.device)
        offsets = torch.searchsorted(owners, bounds)
        return Spans(offsets, int(torch.diff(offsets).max()) if num_sequences else 0, False)


@dataclass(frozen=True)
class RowOwners:
    """A batch's tokens by sequence, made of its Segments.

    For packed and indexed batches the offsets are read once, which on a GPU waits for them.
    """

    segments: Segments
    end: int = field(init=False)  # rows past this one (in order) are unassigned
    max_length: int = field(init=False)
    equal: bool = field(init=False)

    def __post_init__(self) -> None:
        s = self.segments
        equal = s.order is None and s.shape is not None and len(s.shape) == 2 and s.shape[1] > 0
        if equal:
            assert s.shape is not None
            end, longest = math.prod(s.shape), s.shape[1]
        else:
            longest = int(torch.diff(s.offsets).max()) if s.num_sequences else 0
            end = int(s.offsets[-1])
        for name, value in (("end", end), ("max_length", longest), ("equal", equal)):
            object.__setattr__(self, name, value)

    def by_sequence(self, site: str, grad: Tensor, *others: Tensor) -> tuple[Spans, list[Tensor]]:
        """A module's output gradient and tensors beside it, all [*lead, d], as rows [R, d] sorted by sequence.

        Raises RuntimeError where `lead` does not tell whose row is whose, or a row that is unassigned has a gradient.
        """
        lead = tuple(grad.shape[:-1])
        per_token = self.rows_per_token(site, lead)
        tensors = [t.expand(*lead, t.shape[-1]) for t in (grad, *others)]
        if self.equal:
            return self._spans(per_token), [t.reshape(math.prod(lead), t.shape[-1]) for t in tensors]
        tokens = [t.reshape(math.prod(lead) // max(per_token, 1), per_token, t.shape[-1]) for t in tensors]
        order = self.segments.order
        self.check_unassigned(site, tokens[0][self.end :] if order is None else tokens[0][order[self.end :]])
        kept = [t[: self.end] if order is None else t[order[: self.end]] for t in tokens]
        return self._spans(per_token), [t.flatten(0, 1) for t in kept]

    def sort_by_sequence(self, positions: Tensor) -> tuple[Tensor, Spans]:
        """Of flat token positions [M]: the permutation that sorts them by sequence, and its spans.

        Positions that are unassigned come last, after the spans' end.
        """
        order = self.segments.order
        rank = positions if order is None else torch.argsort(order)[positions]
        sorted_, permutation = torch.sort(rank, stable=True)
        offsets = torch.searchsorted(sorted_, self.segments.offsets)
        return permutation, Spans(offsets, self.max_length, False)

    def _spans(self, per_token: int) -> Spans:
        return Spans(self.segments.offsets * per_token, self.max_length * per_token, self.equal)

    def rows_per_token(self, site: str, lead: tuple[int, ...]) -> int:
        """Rows that a module with these leading dimensions has of each token."""
        rows = math.prod(lead)
        if self.equal:
            assert self.segments.shape is not None
            batch, length = self.segments.shape
            by_row = lead[:1] == (batch,) and (length in lead[1:] or length == 1)
            flat = lead[:1] == (batch * length,)
            if (by_row or flat) and rows % max(batch * length, 1) == 0:
                return rows // max(batch * length, 1)
            wanted = f"({batch}, {length}, ..) or ({batch * length}, ..)"
        else:
            shape = self.segments.shape
            if shape is not None and len(shape) > 1 and lead[: len(shape)] == shape:
                return math.prod(lead[len(shape) :])
            count = None if shape is None else math.prod(shape)
            inner = lead[1:] if len(lead) > 1 and lead[0] == 1 else lead
            if inner and inner[0] >= self.end and count in (None, inner[0]):
                return math.prod(inner[1:])
            wanted = f"({count or self.end}, ..) or (1, {count or self.end}, ..)"
        raise RuntimeError(
            f"SequenceGradients: the output of {site} has leading dimensions {lead}, but the segments have {wanted}: "
            "which row is whose sequence's cannot be told. Pass the Segments of the batch that the model was called with; "
            "where the module shares rows between sequences (or reorders them) and parameters are whole, use OPOBAccumulator."
        )

    def check_unassigned(self, site: str, rows: Tensor) -> None:
        """Raise where rows that belong to no sequence have a gradient."""
        if rows.numel() and bool(rows.any()):
            raise RuntimeError(
                f"SequenceGradients: at {site}, tokens that belong to no sequence take a gradient (segment id -1, or "
                "past the end of cu_seqlens). What several sequences share, such as a common prefix, has one gradient that is "
                "the sum of all theirs, which cannot be told apart. Give every sequence its own copy of the prefix, or, where "
                "parameters are whole, use OPOBAccumulator."
            )
