"""The advantages against plain Python over groups, in every layout, and their promise: equal rewards give exactly zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vcpo_kernels as vk
from tests.sequences.brute_force import LAYOUTS, lay_out
from vcpo_kernels import objectives
from vcpo_kernels.objectives import ADVANTAGES

GROUPS = [0, 2, 0, 2, 2, 0, 1]  # group 1 has one sequence
LENGTHS = [3, 5, 2, 1, 4, 3, 2]


def by_group(groups: list[int], values: Callable[[list[int]], list[float]]) -> list[float]:
    """`values` gets the members of each group and gives their advantages."""
    out = [0.0] * len(groups)
    for g in set(groups):
        members = [i for i, group in enumerate(groups) if group == g]
        for i, value in zip(members, values(members), strict=True):
            out[i] = value
    return out


def population_std(r: list[float]) -> float:
    mean = math.fsum(r) / len(r)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in r) / len(r))


rewards_strategy = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0, 3.0]), min_size=7, max_size=7)


@settings(max_examples=40, deadline=None)
@given(rewards=rewards_strategy, seed=st.integers(0, 1000))
def test_against_plain_python(rewards: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_w, norms = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    norms = norms.square()
    r, groups = torch.tensor(rewards, dtype=torch.float64), torch.tensor(GROUPS)

    def less_weighted_mean(weights: list[float]) -> Callable[[list[int]], list[float]]:
        def of(members: list[int]) -> list[float]:
            values = [rewards[i] for i in members]
            if max(values) == min(values):
                return [0.0] * len(members)
            total = math.fsum(weights[i] for i in members)
            mean = math.fsum(weights[i] * rewards[i] for i in members) / total
            return [x - mean for x in values]

        return of

    def normalized(members: list[int]) -> list[float]:
        std = population_std([rewards[i] for i in members])
        return [x / std if std > 1e-8 else x for x in less_weighted_mean([1.0] * 7)(members)]

    def leave_one_out(members: list[int]) -> list[float]:
        if len(members) == 1:
            return [0.0]
        total = math.fsum(rewards[i] for i in members)
        return [rewards[i] - (total - rewards[i]) / (len(members) - 1) for i in members]

    opob = [math.exp(2 * w) * n for w, n in zip(log_w.tolist(), norms.tolist(), strict=True)]
    expected = {
        "group_mean_advantages": (less_weighted_mean([1.0] * 7), ()),
        "group_normalized_advantages": (normalized, ()),
        "leave_one_out_advantages": (leave_one_out, ()),
        "length_weighted_advantages": (less_weighted_mean([float(n) for n in LENGTHS]), (torch.tensor(LENGTHS),)),
        "opob_advantages": (less_weighted_mean(opob), (log_w, norms)),
    }
    for name, (formula, more) in expected.items():
        keywords = {"normalize_std": False} if name == "opob_advantages" else {}
        got = getattr(objectives, name)(r, groups, *more, **keywords)
        want = torch.tensor(by_group(GROUPS, formula), dtype=torch.float64)
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    segments = vk.Segments.padded(torch.arange(6) < torch.tensor(LENGTHS)[:, None])
    stats = vk.token_stats(torch.randn(7, 6, 5, dtype=dtype), torch.randint(0, 5, (7, 6)))
    held = {
        "lengths": segments.lengths,
        "log_weights": torch.randn(7, dtype=dtype),
        "score_sqnorm": segments.sum(stats.score_sqnorm),
        "stats": stats,
        "segments": segments,
    }
    return tuple(held[need] for need in ADVANTAGES[name].needs)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_exactly_zero(name: str) -> None:
    """0.1 summed thrice and divided by three is not 0.1; a group of one is such a group."""
    rewards = torch.full((7,), 0.1)
    rewards[[1, 3, 4]] = -0.7
    out = ADVANTAGES[name].function(rewards, torch.tensor(GROUPS), *inputs(name, torch.float32))
    assert not out.any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_by_size_are_groups_by_id(name: str) -> None:
    rewards, more = torch.randn(7, dtype=torch.float64), inputs(name)
    by_size = ADVANTAGES[name].function(rewards, 7, *more)
    assert torch.equal(by_size, ADVANTAGES[name].function(rewards, torch.zeros(7, dtype=torch.int64), *more))
    assert by_size.dtype == torch.float64
    assert not by_size.requires_grad


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_shift_of_all_rewards_changes_nothing(name: str) -> None:
    rewards, more = torch.randn(7, dtype=torch.float64), inputs(name)
    keywords = {"zero_tail": False} if name == "optimal_token" else {}
    a, b = (ADVANTAGES[name].function(r, torch.tensor(GROUPS), *more, **keywords) for r in (rewards, rewards + 5.0))
    torch.testing.assert_close(a, b)
    assert a.any()


@pytest.mark.parametrize("name", ["mean", "mean_std", "leave_one_out", "opob"])
def test_sequences_that_take_no_part(name: str) -> None:
    """As if they were not there, whatever their reward."""
    rewards, groups = torch.randn(7, dtype=torch.float64), torch.tensor(GROUPS)
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 1])
    more = inputs(name)
    without = ADVANTAGES[name].function(rewards[valid > 0], groups[valid > 0], *(m[valid > 0] for m in more))
    rewards[2] = math.nan
    got = ADVANTAGES[name].function(rewards, groups, *more, valid=valid)
    torch.testing.assert_close(got[valid > 0], without)
    assert got[2] == 0


def test_opob_leaves_out_a_sequence_without_a_usable_weight() -> None:
    log_w = torch.tensor([0.0, math.inf, math.nan, -math.inf, 0.3])
    got = objectives.opob_advantages(torch.arange(5.0), 5, log_w, torch.ones(5), normalize_std=False)
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0, math.exp(0.6)])
    baseline = (weights * torch.arange(5.0)).sum() / weights.sum()
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.0, 3.0, 4.0]) - baseline * torch.tensor([1, 0, 0, 1, 1]))


# --- the optimal token baseline ---------------------------------------------------------------------------------------


def token_baseline(
    rewards: list[float], norms: list[list[float]], zero_tail: bool, groups: list[int] = GROUPS
) -> list[list[float]]:
    """B_t = sum_j W_jt R_j / sum_j W_jt, one position of one group at a time."""
    out = [[0.0] * len(row) for row in norms]
    for g in set(groups):
        members = [i for i, group in enumerate(groups) if group == g and norms[i]]
        values = [rewards[i] for i in members]
        if not members or max(values) == min(values):
            continue
        for t in range(max(len(norms[i]) for i in members)):
            here = [i for i in members if t < len(norms[i])]
            w = [math.fsum(norms[i][: t + 1]) for i in here]
            total = math.fsum(w)
            if total > 0:
                b = math.fsum(x * rewards[i] for x, i in zip(w, here, strict=True)) / total
            else:
                b = math.fsum(rewards[i] for i in here) / len(here)
            if len(here) == 1 and zero_tail:
                b = 0.0
            for i in here:
                out[i][t] = rewards[i] - b
    return out


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("zero_tail", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_optimal_token_baseline_in_every_layout(kind: str, zero_tail: bool, weighted: bool) -> None:
    lengths = [3, 5, 0, 1, 4, 3, 2]
    layout = lay_out(kind, lengths)
    norms = [torch.rand(n, dtype=torch.float64) for n in lengths]
    norms[3].zero_()  # the only token of its sequence has no variance
    factors = [torch.rand(n, dtype=torch.float64) + 0.5 for n in lengths]
    rewards = torch.randn(7, dtype=torch.float64)
    scores = layout.place(norms)  # NaN wherever nothing was sampled
    stats = vk.TokenStats(torch.zeros_like(scores), torch.zeros_like(scores), scores, torch.zeros_like(scores))
    got = objectives.optimal_token_advantages(
        rewards,
        torch.tensor(GROUPS),
        stats,
        layout.segments,
        token_weights=layout.place(factors) if weighted else None,
        zero_tail=zero_tail,
    )
    used = [n * f**2 if weighted else n for n, f in zip(norms, factors, strict=True)]
    want = token_baseline(rewards.tolist(), [n.tolist() for n in used], zero_tail)
    torch.testing.assert_close(got, layout.place([torch.tensor(w, dtype=torch.float64) for w in want], fill=0.0))
    assert got.shape == scores.shape


def test_optimal_token_baseline_counts_from_the_first_predicted_token() -> None:
    """Shifted statistics: entry 0 of a row has no prediction, so position 1 is the first."""
    scores = torch.rand(3, 4, dtype=torch.float64)
    zeros = torch.zeros_like(scores)
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    ones = torch.ones(3, 4)
    shifted = objectives.optimal_token_advantages(
        rewards, 3, vk.TokenStats(zeros, zeros, scores, zeros, shifted=True), vk.Segments.padded(ones)
    )
    short = objectives.optimal_token_advantages(
        rewards, 3, vk.TokenStats(*(t[:, 1:] for t in (zeros, zeros, scores, zeros))), vk.Segments.padded(ones[:, 1:])
    )
    assert torch.equal(shifted[:, 1:], short)
    assert not shifted[:, 0].any()


def test_token_advantages_go_into_an_objective() -> None:
    segments = vk.Segments.padded(torch.arange(6) < torch.tensor(LENGTHS)[:, None])
    logits = torch.randn(7, 6, 5, requires_grad=True)
    stats = vk.token_stats(logits, torch.randint(0, 5, (7, 6)))
    a: Tensor = objectives.optimal_token_advantages(torch.randn(7), torch.tensor(GROUPS), stats, segments)
    out = objectives.ppo_clip(stats, stats.logp.detach(), a, segments, aggregation="token-mean")
    torch.testing.assert_close(out.coefficients, a / segments.lengths.sum())
