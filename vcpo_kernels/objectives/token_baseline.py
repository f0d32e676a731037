"""The optimal token baseline: one baseline for every position of a group's sequences.

Layer: tokens [N]. Sums over (group, position) by sorting, so that it needs no padding and no synchronisation in any layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.objectives.tokens import like_logp
from vcpo_kernels.rows.token_stats import TokenStats, check_stats
from vcpo_kernels.sequences.baselines import check_groups, check_rewards, group_baselines, grouped
from vcpo_kernels.sequences.segments import Segments, check_seen, check_segments


def optimal_token_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    stats: TokenStats,
    segments: Segments,
    *,
    token_weights: Tensor | None = None,
    zero_tail: bool = True,
    num_groups: int | None = None,
) -> Tensor:
    """A_it = R_i - B_t with B_t = sum_j W_jt R_j / sum_j W_jt over the group's sequences that reach position t.

    W_jt = sum_{s <= t} rho_js^2 ||e_y - p||^2 is the variance that the sequence has gathered so far, in logit space: verl's
    "optimal_token_baseline", whose 1 - 2 pi + sum pi^2 is `stats.score_sqnorm`, with the return R_i at every position. t counts
    the sequence's valid tokens. Where all W are 0 the baseline is the mean. Two things verl does not do: a group whose rewards
    are all equal gets exactly zero, and no epsilon is added to the denominator.

    Args:
        rewards: R_i, [B]. groups, num_groups: as in `group_mean_advantages`.
        stats: from `token_stats`; score_sqnorm is read.
        segments: which tokens belong to which sequence, and which count.
        token_weights: rho_t, truncated importance weights in the shape of stats.logp, as verl's rollout_is_weights. None: 1.
        zero_tail: no baseline for the longest sequence of a group beyond the second longest, where it would be compared with
            itself alone (verl's handle_zero_tail). False: such tokens get 0.

    Returns:
        Advantages in the shape of stats.logp, 0 where a token does not count.

    Raises:
        TypeError, ValueError: naming the argument; on the CPU also for rewards and token_weights that are not finite.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.long))
    >>> seg = vk.Segments.padded(torch.tensor([[1, 1], [1, 0]]))
    >>> objectives.optimal_token_advantages(torch.tensor([1.0, 0.0]), 2, stats, seg)
    tensor([[ 0.5000,  1.0000],
            [-0.5000,  0.0000]])
    """
    check = Check("optimal_token_advantages")
    check_segments(check, segments)
    check_stats(check, stats)
    norms = segments.flat(check, "stats", stats.score_sqnorm).detach()
    check.tensor("rewards", rewards)
    check.shape("rewards", rewards, (segments.num_sequences,), "one reward per sequence")
    check.same_device("rewards", rewards, "stats", norms)
    ids, size, count = check_groups(check, groups, rewards.shape[0], num_groups)
    if ids is None:
        ids = torch.arange(rewards.shape[0], device=rewards.device) // size
    check.same_device("groups", ids, "stats", norms)
    tail = check.boolean("zero_tail", zero_tail)
    weights = None if token_weights is None else like_logp(check, "token_weights", token_weights, segments, norms)
    check_seen(check, segments, stats)
    if segments.sequence_group is not None:
        raise check.value_error(
            "segments' sequence_group splits sequences over ranks, and this baseline compares tokens by their position in the "
            "sequence. Take it where sequences are whole."
        )
    walk = _Walk(segments.seen_by(stats), norms.numel())
    gathered = norms.double() if weights is None else norms.double() * weights.double().square()
    gathered = torch.where(walk.valid, gathered[walk.order], 0.0)
    if checks.readable(gathered) and not bool(gathered.isfinite().all()):
        raise check.value_error(
            "token_weights (and stats.score_sqnorm) must be finite at valid tokens. Truncate the weights first."
        )
    return _advantages(rewards, ids, count, walk, torch.nan_to_num(gathered, 0.0, 0.0, 0.0), tail, check).view(
        stats.logp.shape
    )


class _Walk:
    """The tokens in order of sequence and position. Tensors [N]: order (flat positions), sequence, valid, position (from 1)."""

    def __init__(self, segments: Segments, num_tokens: int) -> None:
        device = segments.offsets.device
        ranks = torch.arange(num_tokens, device=device)
        self.order = ranks if segments.order is None else segments.order
        # One past the last sequence for unassigned tokens.
        owner = torch.searchsorted(segments.offsets, ranks, right=True) - 1
        self.valid = owner < segments.num_sequences
        if segments.mask is not None:
            self.valid = self.valid & segments.mask[self.order]
        self.sequence = owner.clamp(max=max(segments.num_sequences - 1, 0))
        self.start = segments.offsets[self.sequence] if segments.num_sequences else ranks
        self.position = self.running(self.valid.double()).round().long()
        self.lengths = segments.reduce(torch.ones(num_tokens, device=device))

    def running(self, values: Tensor) -> Tensor:
        """Sums of each sequence up to and including each token, float64; values must be 0 where not valid."""
        total = torch.nn.functional.pad(values.cumsum(0), (1, 0))
        return total[1:] - total[self.start.clamp(max=values.shape[0])]


def _advantages(
    rewards: Tensor, ids: Tensor, count: int, walk: _Walk, gathered: Tensor, zero_tail: bool, check: Check
) -> Tensor:
    reward = rewards.detach().double()
    nonempty = walk.lengths > 0
    check_rewards(check, rewards, nonempty)
    ok = nonempty & reward.isfinite()
    _, _, equal = group_baselines(reward, torch.zeros_like(reward), ok, ids, count)
    valid = walk.valid & ok[walk.sequence]
    r = torch.where(valid, reward[walk.sequence], 0.0)
    w = torch.where(valid, walk.running(gathered), 0.0)
    # One cell per (group, position): cells in use are numbered by sorting their keys, so that no table [groups, T] is needed.
    key = torch.where(valid, ids[walk.sequence] * (r.shape[0] + 1) + walk.position, -1)
    in_order, by_key = torch.sort(key, stable=True)
    new = torch.ones_like(in_order, dtype=torch.bool)
    new[1:] = in_order[1:] != in_order[:-1]
    cell = torch.empty_like(by_key).scatter_(0, by_key, new.cumsum(0) - 1)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(r).scatter_add(0, cell, values)[cell]

    weight, here = total(w), total(valid.double())
    baseline = torch.where(weight > 0, total(w * r) / weight, total(r) / here.clamp(min=1))
    group_size = grouped("sum", ok.double(), ids, count, 0.0)[ids][walk.sequence]
    alone = (here == 1) & (group_size > 1)
    baseline = torch.where(alone, 0.0 if zero_tail else r, baseline)
    advantages = torch.where(valid & ~equal[ids][walk.sequence], r - baseline, 0.0)
    return torch.zeros_like(advantages).scatter(0, walk.order, advantages).to(wide(rewards.dtype))
