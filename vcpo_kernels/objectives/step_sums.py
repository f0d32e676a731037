"""What a loss needs of all the step's sequences: the aggregation's factor, ESS, and the sums that metrics are made of.

Layer: tokens [N] -> sequences [B] -> ranks. One rank takes them of its batch. Over many, the sums of each of its sequences go
into one all-reduce over the ranks that hold their other tokens, and one gather over the ranks that hold other sequences; every
rank then has the step's, to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core.scalars import clamped, log
from vcpo_kernels.objectives.tokens import TokenBatch
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.ranks import Ranks
from vcpo_kernels.sequences.aggregation import step_scale
from vcpo_kernels.sequences.ess import ess_moments


class Aggregation(NamedTuple):
    """name: of `AGGREGATIONS`. The rest: see `CommonTerms`."""

    name: str
    num_sequences: float | None
    num_tokens: float | None
    max_tokens: float | None

    def scale(self, lengths: Tensor, counted: tuple[Tensor, Tensor]) -> Tensor:
        """k_i of a step's sequences, [B] float64, from the lengths of all, and how many sequences and tokens those are."""
        return step_scale(self.name, lengths, self.num_sequences, self.num_tokens, self.max_tokens, counted)


class StepSums(NamedTuple):
    """scale: k_t [N] of this rank's tokens, 0 where one does not count. log_weights: L_i [B] of this rank's sequences.
    own_loss: -sum_t k_t v_t of this rank's tokens, 0-d float64.

    Of the step, float64: num_sequences, num_tokens, loss: 0-d; totals: sums over tokens, [K] of each block of summands;
    moments: its log-weights' (`ess_moments`).
    """

    scale: Tensor
    log_weights: Tensor
    own_loss: Tensor
    num_sequences: Tensor
    num_tokens: Tensor
    loss: Tensor
    totals: Sequence[Tensor]
    moments: Tensor


def step_sums(
    ranks: Ranks | None,
    tokens: TokenBatch,
    aggregation: Aggregation,
    ess_max_weight: float | None,
    summands: Sequence[Tensor],
    values: Tensor,
) -> StepSums:
    """summands: blocks [K, N], values: v_t [N] float64; 0 where a token does not count."""
    if ranks is not None:
        return _of_ranks(ranks, tokens, aggregation, ess_max_weight, summands, values)
    lengths = tokens.lengths
    step = _of_sequences(aggregation, lengths, tokens.log_weights, ess_max_weight)
    scale = tokens.spread(step.scale)
    loss = -(scale * values).sum()
    totals = [block.sum(1, dtype=torch.float64) for block in summands]
    return StepSums(scale, tokens.log_weights, loss, *step.counted, loss, totals, step.moments)


def _of_ranks(
    ranks: Ranks,
    tokens: TokenBatch,
    aggregation: Aggregation,
    ess_max_weight: float | None,
    summands: Sequence[Tensor],
    values: Tensor,
) -> StepSums:
    own, dtype = tokens.segments.of_this_rank(), tokens.logp.dtype
    # In logp's dtype: float64 has no segment kernels on a GPU. Sums over sequences are in float64 again.
    of_tokens = [tokens.valid.to(dtype), tokens.log_weight, values.to(dtype), *torch.cat(list(summands)).to(dtype)]
    sums = torch.stack([own.reduce(column) for column in of_tokens], 1).double()
    sums = collectives.summed(sums, tokens.segments.sequence_group)
    every = collectives.gathered_rows(sums, ranks.data, ranks.uneven)
    lengths, log_weights, weighted = every.rows[:, :3].unbind(1)
    step = _of_sequences(aggregation, lengths, log_weights, ess_max_weight)
    scale = tokens.spread(step.scale[every.mine])
    return StepSums(
        scale, sums[:, 1].to(dtype), -(scale * values).sum(), *step.counted, -(step.scale * weighted).sum(),
        every.rows[:, 3:].sum(0).split([len(block) for block in summands]), step.moments,
    )  # fmt: skip


class _Sequences(NamedTuple):
    """Of the step's sequences: k_i [B], how many they and their tokens are, moments of their log-weights."""

    scale: Tensor
    counted: tuple[Tensor, Tensor]
    moments: Tensor


def _of_sequences(
    aggregation: Aggregation, lengths: Tensor, log_weights: Tensor, ess_max_weight: float | None
) -> _Sequences:
    moments = ess_moments(_clipped(log_weights, ess_max_weight), lengths > 0)
    counted = moments[2], lengths.sum()
    return _Sequences(aggregation.scale(lengths, counted), counted, moments)


def _clipped(log_weights: Tensor, ess_max_weight: float | None) -> Tensor:
    if ess_max_weight is None:
        return log_weights
    # +inf stays a broken weight, which a clamp would make an ordinary one.
    return torch.where(log_weights < math.inf, clamped(log_weights, high=log(ess_max_weight)), math.nan)
