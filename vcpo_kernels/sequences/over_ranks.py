"""The sequences of a whole step: sums over the ranks that hold their other tokens, rows of the ranks that hold other sequences.

Layer: tokens [N] -> sequences [B] -> ranks. Two collectives: one all-reduce of [B, 6] float64 over sequence ranks, before any
exp, one all-gather of [B, 8] over data ranks. Every rank then computes the step's results, to the same bits, and keeps its own
sequences'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.ranks import Ranks
from vcpo_kernels.sequences import baselines
from vcpo_kernels.sequences.segments import Segments, check_segments
from vcpo_kernels.sequences.sequence_results import SequenceSums, Switches, sequence_results
from vcpo_kernels.sequences.vcpo_coefficients import SequenceResults


def ranks_of(check: Check, ranks: object, segments: Segments) -> Ranks | None:
    """The ranks of a step; None where this one has all of it. The segments say who has their sequences' other tokens."""
    check_segments(check, segments)
    if ranks is not None and not isinstance(ranks, Ranks):
        raise check.type_error(f"ranks must be a Ranks, got {checks.describe(ranks)}. Make one: Ranks.of(mesh).")
    of_segments = segments.sequence_group
    if ranks is not None and ranks.sequence is not None and ranks.sequence is not of_segments:
        raise check.value_error(
            "ranks.sequence names ranks that hold other tokens of these sequences, which segments must know of too: "
            "Segments.padded(mask, sequence_group=ranks.sequence)."
        )
    if ranks is None and of_segments is not None:
        return Ranks(sequence=of_segments)
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
    groups: int | Tensor,
    num_groups: int | None,
    switches: Switches,
) -> StepResults:
    """`vcpo_coefficients` of all ranks' sequences. Arguments of this rank: logp, behavior_logp, token_scores [N]; score_norms
    (or None, to sum token_scores), rewards, groups [B] or an int.
    """
    sums = _sequence_sums(segments, logp, behavior_logp, token_scores)
    if score_norms is not None:
        sums = sums._replace(score_norms=score_norms.double())
    local = torch.arange(len(rewards), device=rewards.device) // groups if isinstance(groups, int) else groups
    columns = torch.stack([*sums, rewards.double(), local.double()], 1)
    every = collectives.gathered_rows(columns, ranks.data, ranks.uneven)
    *of_all, all_rewards, ids = every.rows.unbind(1)
    ids = ids.long()
    if isinstance(groups, int):  # whole on their rank, numbered from its first row on
        ids = ids + every.first // groups
        count = len(ids) // groups
    else:
        count = len(ids) if num_groups is None else num_groups
        _check_ids(check, ids, count)
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


def _check_ids(check: Check, ids: Tensor, count: int) -> None:
    if checks.readable(ids) and ids.numel() and bool(((ids < 0) | (ids >= count)).any()):
        raise check.value_error(
            f"groups must lie in [0, {count}) over all ranks, got ids from {int(ids.min())} to {int(ids.max())}. With ranks= "
            "they are the step's: a prompt has one id on all ranks, and another prompt another."
        )


def check_groups(check: Check, groups: int | Tensor, num_sequences: int, num_groups: int | None) -> int | Tensor:
    """As `baselines.check_groups`, where ids are the step's, so that what they are below is not known yet."""
    if isinstance(groups, Tensor):
        check.tensor("groups", groups, checks.ID_DTYPES, "Number the prompts of the step from 0.")
        check.shape("groups", groups, (num_sequences,), "one group id per sequence")
        if num_groups is not None:
            check.integer("num_groups", num_groups, 0)
        return groups.to(torch.int64)
    return baselines.check_groups(check, groups, num_sequences, num_groups)[1]
