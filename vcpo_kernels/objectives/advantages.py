"""Advantages: from rewards and groups to what an objective takes, one function per baseline.

Layer: sequences [B] (the optimal token baseline: tokens [N]). All are constants without gradient. A group whose rewards are all
equal (a group of one among them) gets exactly zero, whatever the baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.parallel.ranks import Ranks
from vcpo_kernels.sequences.baselines import check_norms, check_rewards, group_baselines, grouped, step_columns
from vcpo_kernels.sequences.log_weights import usable

STD_FLOOR = 1e-8  # as vcpo_loss: a smaller deviation does not divide


class GroupedRewards:
    """Checked rewards and groups: r [B] float64, ids [B], count, ok (which sequences are in), columns (others of [B], in
    float64), all of the whole step; mine, which of its sequences are this rank's; and the dtype of the results.
    """

    def __init__(
        self,
        check: Check,
        rewards: Tensor,
        groups: int | Tensor,
        num_groups: int | None,
        valid: Tensor | None,
        ranks: Ranks | None = None,
        *columns: Tensor,
    ) -> None:
        check.tensor("rewards", rewards)
        check.float64("rewards", rewards)
        if rewards.dim() != 1:
            raise check.value_error(
                f"rewards must be [B], got {checks.describe(rewards)}. Flatten it: rewards.reshape(-1)."
            )
        if valid is None:
            valid = torch.ones_like(rewards, dtype=torch.bool)
        else:
            valid = check.mask("valid", valid)
            check.shape("valid", valid, rewards.shape, "rewards.shape")
            check.same_device("valid", valid, "rewards", rewards)
        if isinstance(groups, Tensor):
            check.same_device("groups", groups, "rewards", rewards)
        own = [c.detach().double() for c in (rewards, valid, *columns)]
        (self.r, in_step, *self.columns), self.ids, self.count, self.mine = step_columns(
            check, own, groups, num_groups, ranks
        )
        self.dtype = wide(rewards.dtype)
        check_rewards(check, self.r, in_step != 0)
        self.ok = (in_step != 0) & self.r.isfinite()

    def own(self, advantages: Tensor) -> Tensor:
        """This rank's of the step's, in the dtype of the results."""
        return advantages[self.mine].to(self.dtype)

    def centred(self, log_a: Tensor, ok: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """R less the exp(log_a)-weighted mean of its group (0 where not ok, or all equal), and the group's std, by sequence."""
        ok = self.ok if ok is None else ok
        baseline, std, equal = group_baselines(self.r, log_a, ok, self.ids, self.count)
        return torch.where(ok & ~equal[self.ids], self.r - baseline[self.ids], 0.0), std[self.ids]

    def optimal(self, log_weights: Tensor, sqnorms: Tensor, normalize_std: bool) -> Tensor:
        """`opob_advantages` from L_i and n_i in float64. A sequence that either is no number for is out, and gets 0."""
        ok = self.ok & usable(log_weights) & (sqnorms >= 0) & sqnorms.isfinite()
        centred, std = self.centred(2 * log_weights + sqnorms.log(), ok)
        return self.own(_divided(centred, std) if normalize_std else centred)

    def sizes(self) -> Tensor:
        """How many sequences of its group are in, by sequence."""
        return grouped("sum", self.ok.double(), self.ids, self.count, 0.0)[self.ids]


def group_mean_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    num_groups: int | None = None,
    valid: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """R_i less the mean of its group (Dr.GRPO, arXiv 2503.20783).

    Args:
        rewards: R_i, [B].
        groups: sequences per prompt (consecutive), or an integer group id per sequence, [B].
        num_groups: for ids, how many groups there are; default B, an upper bound that needs no synchronisation.
        valid: bool [B]; false takes a sequence out of its group, with advantage 0 (`segments.lengths > 0`). None: all in.
        ranks: whose data ranks hold the step's other sequences, for groups that are split over them: one gather. An int
            `groups` means groups that are whole on this rank; ids are the step's, below num_groups (default: its sequences).

    Returns:
        [B], float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: naming the argument; on the CPU also for rewards that are not finite.

    >>> import torch
    >>> from vcpo_kernels import objectives
    >>> objectives.group_mean_advantages(torch.tensor([1.0, 0.0, 3.0, 3.0]), 2)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    batch = GroupedRewards(Check("group_mean_advantages"), rewards, groups, num_groups, valid, ranks)
    return batch.own(batch.centred(torch.zeros_like(batch.r))[0])


def group_normalized_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    sample_std: bool = False,
    epsilon: float = 0.0,
    num_groups: int | None = None,
    valid: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """(R_i - mean) / (std + epsilon) over its group (GRPO, arXiv 2402.03300).

    The default is `vcpo_loss`'s: the population's standard deviation, dividing where it is > 1e-8. TRL has sample_std=True and
    epsilon=1e-4, verl sample_std=True and 1e-6.

    Args:
        rewards, groups, num_groups, valid, ranks: as in `group_mean_advantages`.
        sample_std: divide the squares by n - 1 instead of n.
        epsilon: added to the deviation, >= 0.

    Returns:
        [B], float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch
    >>> from vcpo_kernels import objectives
    >>> objectives.group_normalized_advantages(torch.tensor([4.0, 0.0, 3.0, 3.0]), 2)
    tensor([ 1., -1.,  0.,  0.])
    """
    check = Check("group_normalized_advantages")
    sample = check.boolean("sample_std", sample_std)
    epsilon = check.finite_float("epsilon", epsilon, minimum=0.0)
    batch = GroupedRewards(check, rewards, groups, num_groups, valid, ranks)
    centred, std = batch.centred(torch.zeros_like(batch.r))
    if sample:
        size = batch.sizes()
        std = std * (size / (size - 1).clamp(min=1)).sqrt()
    return batch.own(_divided(centred, std, epsilon))


def _divided(advantages: Tensor, std: Tensor, epsilon: float = 0.0) -> Tensor:
    return torch.where(std > STD_FLOOR, advantages / (std + epsilon), advantages)


def leave_one_out_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    num_groups: int | None = None,
    valid: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """RLOO: R_i less the mean of the others of its group, n/(n - 1) (R_i - mean) (arXiv 2402.14740; verl's "rloo").

    A group of one has no others and gets 0 (verl leaves its reward as it is).

    Args:
        rewards, groups, num_groups, valid, ranks: as in `group_mean_advantages`.

    Returns:
        [B], float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch
    >>> from vcpo_kernels import objectives
    >>> objectives.leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0]), 4)
    tensor([ 0.0000, -1.3333, -1.3333,  2.6667])
    """
    batch = GroupedRewards(Check("leave_one_out_advantages"), rewards, groups, num_groups, valid, ranks)
    size = batch.sizes()
    centred = batch.centred(torch.zeros_like(batch.r))[0]
    return batch.own(centred * size / (size - 1).clamp(min=1))


def length_weighted_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    lengths: Tensor,
    *,
    num_groups: int | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """OPO: R_i less the length-weighted mean of its group, sum |T_j| R_j / sum |T_j| (arXiv 2505.23585; verl's "opo").

    The optimal baseline on the policy where every token's score has the same norm. A sequence without tokens takes no part.

    Args:
        rewards, groups, num_groups, ranks: as in `group_mean_advantages`.
        lengths: |T_i|, [B] (`segments.lengths`).

    Returns:
        [B], float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch
    >>> from vcpo_kernels import objectives
    >>> objectives.length_weighted_advantages(torch.tensor([1.0, 0.0]), 2, torch.tensor([3.0, 1.0]))
    tensor([ 0.2500, -0.7500])
    """
    check = Check("length_weighted_advantages")
    check.tensor("rewards", rewards)
    check.tensor("lengths", lengths)
    check.shape("lengths", lengths, rewards.shape, "rewards.shape")
    batch = GroupedRewards(check, rewards, groups, num_groups, lengths > 0, ranks, lengths)
    return batch.own(batch.centred(batch.columns[0].log())[0])


def opob_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    log_weights: Tensor,
    score_sqnorm: Tensor,
    *,
    normalize_std: bool = True,
    num_groups: int | None = None,
    valid: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """VCPO's off-policy optimal baseline for any objective: R_i - b_g, b_g = sum a_j R_j, a = softmax(2 L_j + log n_j).

    As `vcpo_loss` with its default baseline (arXiv 2602.17616); `off_policy_baseline` has the baseline itself. A sequence
    whose L_i is NaN or +inf takes no part and gets 0.

    Args:
        rewards, groups, num_groups, valid, ranks: as in `group_mean_advantages`.
        log_weights: L_i, [B] (`sequence_log_weights`).
        score_sqnorm: n_i, [B]: `segments.sum(stats.score_sqnorm)`, or exact ones from `SequenceGradients`.
        normalize_std: divide by the group's population standard deviation where that is > 1e-8.

    Returns:
        [B], float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch
    >>> from vcpo_kernels import objectives
    >>> objectives.opob_advantages(
    ...     torch.tensor([1.0, 0.0]), 2, torch.zeros(2), torch.tensor([3.0, 1.0]), normalize_std=False)
    tensor([ 0.2500, -0.7500])
    """
    check = Check("opob_advantages")
    check.tensor("rewards", rewards)
    for name, value in (("log_weights", log_weights), ("score_sqnorm", score_sqnorm)):
        check.tensor(name, value, (torch.float32, torch.float64), f"Convert it: {name}.float().")
        check.shape(name, value, rewards.shape, "rewards.shape")
        check.same_device(name, value, "rewards", rewards)
    batch = GroupedRewards(check, rewards, groups, num_groups, valid, ranks, log_weights, score_sqnorm)
    log_w, norms = batch.columns
    check_norms(check, "score_sqnorm", norms, batch.ok & usable(log_w))
    return batch.optimal(log_w, norms, check.boolean("normalize_std", normalize_std))
