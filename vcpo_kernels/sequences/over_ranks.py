"""The sequences of a whole step: sums over the ranks that hold their other tokens, rows of the ranks that hold other sequences.

Layer: tokens [N] -> sequences [B] -> ranks. Two collectives: one all-reduce of [B, 6] float64 over sequence ranks, before any
exp, one all-gather of [B, 8] over data ranks. Every rank then computes the step's results, to the same bits, and keeps its own
sequences'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.ranks import Ranks, check_ranks
from vcpo_kernels.sequences.baselines import StepGroups
from vcpo_kernels.sequences.segments import Segments, check_segments
from vcpo_kernels.sequences.sequence_results import SequenceSums, Switches, sequence_results
from vcpo_kernels.sequences.vcpo_coefficients import SequenceResults


def ranks_of(check: Check, ranks: Ranks | None, segments: Segments) -> Ranks | None:
    """The ranks of a step; None where this one has all of it. The segments say who has their sequences' other tokens."""
    check_segments(check, segments)
    of_segments = segments.sequence_group
    if ranks is None:
        return None if of_segments is None else Ranks(sequence=of_segments)
    check_ranks(check, ranks)
    if ranks.sequence is not None and ranks.sequence is not of_segments:
        raise check.value_error(
            "ranks.sequence names ranks that hold other tokens of these sequences, which segments must know of too: "
            "Segments.padded(mask, sequence_group=ranks.sequence)."
        )
    return ranks


class StepResults(NamedTuple):
    """Of the whole step, the same on every rank. mine: which of its sequences are this rank's. rewards, score_norms: [B] of
    all, as they were gathered.
    """

    results: SequenceResults
    mine: slice
    rewards: Tensor
    score_norms: Tensor

    def own(self) -> SequenceResults:
        """This rank's sequences; baselines, moments and metrics stay the step's."""
        r = self.results
        per_sequence = ("log_weights", "lengths", "advantages", "coefficients")
        return r._replace(**{name: getattr(r, name)[self.mine] for name in per_sequence})


def step_results(
    check: Check,
    ranks: Ranks,
    segments: Segments,
    logp: Tensor,
    behavior_logp: Tensor,
    token_scores: Tensor | None,
    score_norms: Tensor | None,
    rewards: Tensor,
    groups: StepGroups,
    switches: Switches,
) -> StepResults:
    """`vcpo_coefficients` of all ranks' sequences. Arguments of this rank: logp, behavior_logp, token_scores [N]; score_norms
    (or None, to sum token_scores), rewards [B].
    """
    sums = _sequence_sums(segments, logp, behavior_logp, token_scores)
    if score_norms is not None:
        sums = sums._replace(score_norms=score_norms.double())
    columns = torch.stack([*sums, rewards.double(), groups.local_ids(rewards).double()], 1)
    every = collectives.gathered_rows(columns, ranks.data, ranks.uneven)
    *of_all, all_rewards, ids = every.rows.unbind(1)
    ids, count = groups.of_step(check, ids, every.first)
    results = sequence_results(SequenceSums(*of_all), all_rewards, ids, count, switches, logp.dtype)
    return StepResults(results, every.mine, all_rewards, of_all[1])


def _sequence_sums(
    segments: Segments, logp: Tensor, behavior_logp: Tensor, token_scores: Tensor | None
) -> SequenceSums:
    log_ratio = logp - behavior_logp
    finite = log_ratio.isfinite()
    of_tokens = (
        log_ratio,
        torch.zeros_like(logp) if token_scores is None else token_scores,
        torch.ones_like(logp),
        torch.where(finite, log_ratio.abs(), 0.0),
        (finite & (log_ratio < 0)).to(logp.dtype),
        finite.to(logp.dtype),
    )
    own = segments.of_this_rank()
    sums = torch.stack([own.reduce(values).double() for values in of_tokens], 1)
    return SequenceSums(*collectives.summed(sums, segments.sequence_group).unbind(1))
