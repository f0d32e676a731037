"""Aggregation: k_i, the factor that turns sums over tokens into a batch's mean in one of the ways trainers mean it.

Layer: sequences [B].
"""

from __future__ import annotations

from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.scalars import filled
from vcpo_kernels.sequences.segments import Segments

AGGREGATIONS = ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-mean")


def aggregation_scale(
    aggregation: str, lengths: Tensor, num_sequences: Tensor, num_tokens: Tensor, max_tokens: float | None
) -> Tensor:
    """k_i [B] float64. A sequence without tokens gets a finite number; its coefficient is 0 all the same."""
    if aggregation == "token-mean":
        return num_tokens.clamp(min=1).reciprocal().expand_as(lengths)
    sequences = num_sequences.clamp(min=1)
    if aggregation == "seq-mean-token-mean":
        return (sequences * lengths.clamp(min=1)).reciprocal()
    longest = (max_tokens or 1.0) if aggregation == "seq-mean-token-sum-norm" else 1.0
    return (sequences * longest).reciprocal().expand_as(lengths)


def step_scale(
    aggregation: str,
    lengths: Tensor,
    num_sequences: float | Tensor | None,
    num_tokens: float | Tensor | None,
    max_tokens: float | None,
    counted: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`aggregation_scale` with the step's counts as given, or where None counted in lengths [B] float64 (`counted`: done)."""
    if counted is None:
        counted = (lengths > 0).sum(dtype=lengths.dtype), lengths.sum()
    totals = [c if n is None else filled(c, n) for n, c in zip((num_sequences, num_tokens), counted, strict=True)]
    return aggregation_scale(aggregation, lengths, totals[0], totals[1], max_tokens)


def longest_possible(
    check: Check, aggregation: str, max_tokens: float | None, segments: Segments, name: str, fix: str
) -> float | None:
    """T_max of "seq-mean-token-sum-norm": as given, else the padded length. name, fix: of the argument, for the error."""
    if aggregation != "seq-mean-token-sum-norm" or max_tokens is not None:
        return max_tokens
    if segments.max_length is None or segments.sequence_group is not None:
        raise check.value_error(
            f"aggregation 'seq-mean-token-sum-norm' needs {name} for packed and indexed segments, and for sequences split "
            f"over ranks, whose longest possible sequence is not known. {fix} to the generation limit."
        )
    return float(segments.max_length)
