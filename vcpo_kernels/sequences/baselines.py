"""Baselines b_g of each prompt group, and the advantages they give.

Layer: sequences [B]. Every baseline here is a softmax-weighted mean of the group's rewards, b_g = sum_i a_i R_i with
a = softmax over the group of some log-weight per sequence; `WEIGHTINGS` says which. Adding one is adding a line there.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.ranks import Ranks, check_ranks
from vcpo_kernels.sequences.log_weights import usable


@dataclass(frozen=True)
class SequenceTerms:
    """What a baseline's log-weight may be made of, each [B] float64.

    log_weights: L_i, unclipped. log_clipped: min(L_i, log max_weight). log_norms: log n_i = log ||grad log pi(y_i)||^2.
    log_scale: log k_i, the aggregation's factor. log_lengths: log |T_i|.
    """

    log_weights: Tensor
    log_clipped: Tensor
    log_norms: Tensor
    log_scale: Tensor
    log_lengths: Tensor


# What stands in the softmax. "paper": VCPO, arXiv 2602.17616. "estimator": minimises the variance of the truncated,
# length-normalised estimator that is really used. "official": what the authors' code computes, w counted twice.
# "mean": the group mean (GRPO). "length": length-weighted (OPO, arXiv 2505.23585).
WEIGHTINGS: dict[str, Callable[[SequenceTerms], Tensor]] = {
    "paper": lambda t: 2 * t.log_weights + t.log_norms,
    "estimator": lambda t: 2 * (t.log_scale + t.log_clipped) + t.log_norms,
    "official": lambda t: 2 * t.log_clipped + 2 * t.log_weights + t.log_norms,
    "mean": lambda t: torch.zeros_like(t.log_weights),
    "length": lambda t: t.log_lengths,
}


def check_groups(
    check: Check, groups: int | Tensor, num_sequences: int, num_groups: int | None, of_one: bool = False
) -> tuple[Tensor | None, int, int]:
    """`groups`, checked, as (int64 ids [B], 0, number of groups) or (None, consecutive sequences per group, number).

    of_one: an int may say 1, as a baseline's caller may ask for; advantages would all be 0.
    """
    if isinstance(groups, Tensor):
        fix = "Number prompts from 0: torch.unique(prompt_ids, return_inverse=True)[1]."
        check.tensor("groups", groups, checks.ID_DTYPES, fix)
        check.shape("groups", groups, (num_sequences,), "one group id per sequence")
        count = num_sequences if num_groups is None else check.integer("num_groups", num_groups, 0)
        if checks.readable(groups) and groups.numel() and bool(((groups < 0) | (groups >= count)).any()):
            raise check.value_error(
                f"groups must lie in [0, {count}), got ids from {int(groups.min())} to {int(groups.max())}. "
                "Number them from 0: torch.unique(groups, return_inverse=True)[1]."
            )
        return groups.to(torch.int64), 0, count
    if isinstance(groups, bool) or not isinstance(groups, (int, numbers.Integral)):
        raise check.type_error(
            f"groups must be an int (sequences per prompt, consecutive) or an int64 tensor [B], "
            f"got {checks.describe(groups)}. Group ids go in a tensor: torch.tensor(ids)."
        )
    if num_groups is not None:
        raise check.value_error(
            f"num_groups={num_groups} goes with group ids; an int groups={groups} fixes it already."
        )
    if groups == 1 and not of_one:
        raise check.value_error(
            "groups=1 makes every sequence its own group, whose baseline is its own reward: all advantages, and the "
            "gradient, would be 0. With one sample per prompt take one group of the whole batch (groups=len(rewards)), or "
            "advantages of your own (objectives.reinforce, objectives.sequence_truncated_is)."
        )
    if groups < 1 or num_sequences % groups:
        raise check.value_error(
            f"groups={groups} must divide the {num_sequences} sequences of the batch into whole prompts. "
            "For groups of unequal size pass an int64 tensor of group ids."
        )
    return None, int(groups), num_sequences // int(groups)


@dataclass(frozen=True)
class StepGroups:
    """Groups of sequences that are spread over ranks.

    given: how many consecutive ones of this rank make a group, or ids [B] that are the step's: a prompt has one on all ranks.
    count: below which ids are; None: the step's number of sequences.
    """

    given: int | Tensor
    count: int | None

    @staticmethod
    def checked(
        check: Check, groups: int | Tensor, num_sequences: int, num_groups: int | None, of_one: bool = False
    ) -> StepGroups:
        """As `check_groups`, but that what ids are below is not known yet."""
        if not isinstance(groups, Tensor):
            return StepGroups(check_groups(check, groups, num_sequences, num_groups, of_one)[1], None)
        check.tensor("groups", groups, checks.ID_DTYPES, "Number the prompts of the step from 0.")
        check.shape("groups", groups, (num_sequences,), "one group id per sequence")
        if num_groups is not None:
            check.integer("num_groups", num_groups, 0)
        return StepGroups(groups.to(torch.int64), num_groups)

    def local_ids(self, like: Tensor) -> Tensor:
        """What is gathered of this rank's sequences, [B]."""
        if isinstance(self.given, Tensor):
            return self.given
        return torch.arange(len(like), device=like.device) // self.given

    def of_step(self, check: Check, ids: Tensor, first: Tensor) -> tuple[Tensor, int]:
        """Gathered ids as int64 ids of the step, and how many groups there are. first: the first row of each row's rank.

        Raises ValueError on the CPU for ids out of range, on every rank.
        """
        ids = ids.long()
        if not isinstance(self.given, Tensor):  # whole on their rank, which has whole groups before it
            return ids + first // self.given, len(ids) // self.given
        count = len(ids) if self.count is None else self.count
        if checks.readable(ids) and ids.numel() and bool(((ids < 0) | (ids >= count)).any()):
            raise check.value_error(
                f"groups must lie in [0, {count}) over all ranks, got ids from {int(ids.min())} to {int(ids.max())}. With "
                "ranks= they are the step's: a prompt has one id on all ranks, and another prompt another."
            )
        return ids, count


class StepColumns(NamedTuple):
    """What is known of the step's sequences. columns: each [B of all ranks] float64. ids: their groups' numbers, below
    num_groups. mine: which of them are this rank's.
    """

    columns: list[Tensor]
    ids: Tensor
    num_groups: int
    mine: slice


def step_columns(
    check: Check,
    columns: list[Tensor],
    groups: int | Tensor,
    num_groups: int | None,
    ranks: Ranks | None,
    of_one: bool = False,
) -> StepColumns:
    """columns: each [B] float64, of this rank's sequences. With ranks, one gather over data ranks (two where uneven)."""
    batch, device = columns[0].shape[0], columns[0].device
    if ranks is None:
        found, size, count = check_groups(check, groups, batch, num_groups, of_one)
        ids = torch.arange(batch, device=device) // size if found is None else found
        return StepColumns(columns, ids, count, slice(None))
    check_ranks(check, ranks)
    given = StepGroups.checked(check, groups, batch, num_groups, of_one)
    own = torch.stack([*columns, given.local_ids(columns[0]).double()], 1)
    every = collectives.gathered_rows(own, ranks.data, ranks.uneven)
    *of_all, gathered = every.rows.unbind(1)
    ids, count = given.of_step(check, gathered, every.first)
    return StepColumns(of_all, ids, count, every.mine)


def grouped(reduce: str, values: Tensor, ids: Tensor, count: int, start: float) -> Tensor:
    """values [B] reduced by group -> [count]; `reduce` is "sum", "amax" or "amin", `start` the value of an empty group."""
    out = torch.full((count,), start, dtype=values.dtype, device=values.device)
    return out.scatter_reduce(0, ids, values, reduce, include_self=True)


def group_baselines(
    rewards: Tensor, log_a: Tensor, ok: Tensor, ids: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax-weighted reward of each group, its population standard deviation, and whether all its rewards are equal.

    rewards, log_a: [B] float64; ok: bool [B], which sequences take part. Each result [count]; a group of whose sequences
    none takes part has baseline NaN. Where every log_a of a group is -inf, the baseline is the mean reward.
    """
    r = torch.where(ok, rewards, 0.0)
    size = grouped("sum", ok.double(), ids, count, 0.0)
    mean = grouped("sum", r, ids, count, 0.0) / size
    log_a = torch.where(ok, log_a, -math.inf)
    peak = grouped("amax", log_a, ids, count, -math.inf)
    a = torch.where(ok & (log_a > -math.inf), torch.exp(log_a - peak[ids]), 0.0)
    total = grouped("sum", a, ids, count, 0.0)
    weighted = grouped("sum", a * r, ids, count, 0.0) / total
    baseline = torch.where(total > 0, weighted, mean)
    deviation = torch.where(ok, (r - mean[ids]).square(), 0.0)
    std = (grouped("sum", deviation, ids, count, 0.0) / size).sqrt()
    highest = grouped("amax", torch.where(ok, rewards, -math.inf), ids, count, -math.inf)
    lowest = grouped("amin", torch.where(ok, rewards, math.inf), ids, count, math.inf)
    return baseline, std, highest <= lowest


def off_policy_baseline(
    rewards: Tensor,
    log_weights: Tensor,
    score_sqnorm: Tensor,
    groups: int | Tensor,
    num_groups: int | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """The off-policy optimal baseline: b_g = sum_i a_i R_i, a = softmax_i(2 L_i + log n_i) over group g (VCPO's OPOB).

    It minimises the variance of sum_i w_i (R_i - b) grad log pi(y_i) over b. A group whose n are all 0 falls back to its
    mean reward. Sequences whose L_i is NaN or +inf take no part. `vcpo_loss` offers the other weightings.

    Args:
        rewards: R_i, [B].
        log_weights: L_i, [B] (`sequence_log_weights`).
        score_sqnorm: n_i = ||grad log pi(y_i)||^2, [B], or the logit proxy `segments.sum(stats.score_sqnorm)`.
        groups: sequences per prompt (consecutive), or a group id per sequence, [B].
        num_groups: for ids, how many groups there are; default B, an upper bound that needs no synchronisation.
        ranks: whose data ranks hold the step's other sequences: one gather of 32 bytes a sequence. An int `groups` means groups
            that are whole on this rank, which come in the order of the ranks; ids are the step's.

    Returns:
        [num_groups] in rewards' dtype, a constant without gradient; NaN for a group without sequences.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> vk.off_policy_baseline(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0]), 2)
    tensor([0.7500])
    """
    check = Check("off_policy_baseline")
    check.tensor("rewards", rewards, (torch.float32, torch.float64), "Convert it: rewards.float().")
    check.float64("rewards", rewards)
    if rewards.dim() != 1:
        raise check.value_error(
            f"rewards must be [B], got {checks.describe(rewards)}. Flatten it: rewards.reshape(-1)."
        )
    for name, value in (("log_weights", log_weights), ("score_sqnorm", score_sqnorm)):
        check.tensor(name, value, (torch.float32, torch.float64), f"Convert it: {name}.float().")
        check.shape(name, value, rewards.shape, "rewards.shape")
        check.same_device(name, value, "rewards", rewards)
    if isinstance(groups, Tensor):
        check.same_device("groups", groups, "rewards", rewards)
    own = [v.detach().double() for v in (rewards, log_weights, score_sqnorm)]
    (r, log_w, norms), ids, count, _ = step_columns(check, own, groups, num_groups, ranks, of_one=True)
    check_rewards(check, r, torch.ones_like(r, dtype=torch.bool))
    check_norms(check, "score_sqnorm", norms, usable(log_w))
    ok = usable(log_w) & r.isfinite() & (norms >= 0) & (norms < math.inf)
    return group_baselines(r, 2 * log_w + norms.log(), ok, ids, count)[0].to(rewards.dtype)


def check_rewards(check: Check, rewards: Tensor, valid: Tensor) -> None:
    """On the CPU, a reward of a valid sequence that is not finite is an error."""
    if checks.readable(rewards) and not bool((rewards.isfinite() | ~valid).all()):
        at = int((~rewards.isfinite() & valid).nonzero()[0])
        raise check.value_error(
            f"rewards of sequences with valid tokens must be finite, got {float(rewards[at])} at index {at}. "
            "Give failed samples a finite reward, or mask all their tokens out."
        )


def check_norms(check: Check, name: str, norms: Tensor, in_loss: Tensor) -> None:
    """On the CPU, a squared norm that is negative or not finite is an error, unless its sequence is out of the loss anyway."""
    if not checks.readable(norms):
        return
    bad = in_loss & ~((norms >= 0) & (norms < math.inf))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise check.value_error(
            f"{name} must hold finite values >= 0 (squared norms), got {float(norms[at])} at index {at}. "
            "Square the norms, and look for an overflow where they are inf or NaN."
        )
