"""What a loss needs of all the step's sequences: the aggregation's factor, ESS, and the sums that metrics are made of.

Layer: tokens [N] -> sequences [B] -> ranks. One rank takes them of its batch. Over many, the sums of each of its sequences go
into one all-reduce over the ranks that hold their other tokens, and one gather over the ranks that hold other sequences; every
rank then has the step's, to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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

    def scale(self, lengths: Tensor) -> Tensor:
        """k_i of a step's sequences, [B] float64, from the lengths of all."""
        return step_scale(self.name, lengths, self.num_sequences, self.num_tokens, self.max_tokens)


class StepSums(NamedTuple):
    """scale: k_t [N] float64 of this rank's tokens, 0 where one does not count. log_weights: L_i [B] of this rank's sequences.

    Of the step, 0-d float64: num_sequences, num_tokens; totals: sums over tokens by name; scaled: of those, times k. moments:
    its log-weights' (`ess_moments`).
    """

    scale: Tensor
    log_weights: Tensor
    num_sequences: Tensor
    num_tokens: Tensor
    totals: dict[str, Tensor]
    scaled: dict[str, Tensor]
    moments: Tensor


def step_sums(
    ranks: Ranks | None,
    tokens: TokenBatch,
    aggregation: Aggregation,
    ess_max_weight: float | None,
    totals: Mapping[str, Tensor],
    scaled: Mapping[str, Tensor],
) -> StepSums:
    """totals, scaled: [N] float64, 0 where a token does not count. Those of `scaled` are multiplied by k_t."""
    if ranks is None:
        lengths, log_weights = tokens.lengths, tokens.segments.reduce(tokens.log_weight)
        scale = tokens.spread(aggregation.scale(lengths))
        return StepSums(
            scale, log_weights, (lengths > 0).sum().double(), lengths.sum(),
            {name: values.sum() for name, values in totals.items()},
            {name: (scale * values).sum() for name, values in scaled.items()},
            ess_moments(_clipped(log_weights, ess_max_weight), lengths > 0),
        )  # fmt: skip
    return _of_ranks(ranks, tokens, aggregation, ess_max_weight, totals, scaled)


def _of_ranks(
    ranks: Ranks,
    tokens: TokenBatch,
    aggregation: Aggregation,
    ess_max_weight: float | None,
    totals: Mapping[str, Tensor],
    scaled: Mapping[str, Tensor],
) -> StepSums:
    own = tokens.segments.of_this_rank()
    of_tokens = [tokens.valid.to(tokens.logp.dtype), tokens.log_weight, *totals.values(), *scaled.values()]
    # In logp's dtype: float64 has no segment kernels on a GPU. Sums over sequences are in float64 again.
    sums = torch.stack([own.reduce(values.to(tokens.logp.dtype)).double() for values in of_tokens], 1)
    sums = collectives.summed(sums, tokens.segments.sequence_group)
    every = collectives.gathered_rows(sums, ranks.data, ranks.uneven)
    lengths, log_weights, *rest = every.rows.unbind(1)
    k = aggregation.scale(lengths)
    return StepSums(
        tokens.spread(k[every.mine]),
        sums[:, 1].to(tokens.logp.dtype),
        (lengths > 0).sum().double(),
        lengths.sum(),
        {name: values.sum() for name, values in zip(totals, rest[: len(totals)], strict=True)},
        {name: (k * values).sum() for name, values in zip(scaled, rest[len(totals) :], strict=True)},
        ess_moments(_clipped(log_weights, ess_max_weight), lengths > 0),
    )


def _clipped(log_weights: Tensor, ess_max_weight: float | None) -> Tensor:
    if ess_max_weight is None:
        return log_weights
    # +inf stays a broken weight, which a clamp would make an ordinary one.
    return torch.where(log_weights < math.inf, clamped(log_weights, high=log(ess_max_weight)), math.nan)
