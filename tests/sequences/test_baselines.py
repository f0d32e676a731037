"""Baselines of each prompt group: every weighting against the written-out formula, and the optimality that
OPOB claims.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vcpo_kernels as vk
from tests.sequences import brute_force
from vcpo_kernels.sequences import baselines

NAN, INF = math.nan, math.inf


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand(
    rewards: list[float], log_weights: list[float], norms: list[float], ids: list[int], count: int
) -> list[float]:
    """b_g = sum_i a_i R_i, a = softmax_i(2 L_i + log n_i)."""
    out = []
    for g in range(count):
        members = [i for i, j in enumerate(ids) if j == g and log_weights[i] < INF]
        log_a = [2 * log_weights[i] + (math.log(norms[i]) if norms[i] > 0 else -INF) for i in members]
        out.append(brute_force.weighted_mean([rewards[i] for i in members], log_a) if members else NAN)
    return out


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[float], list[float], list[float], list[int]]:
    """rewards, log-weights, norms (some 0) and group ids of unequal groups, not in order."""
    n = draw(st.integers(1, 10))
    floats = lambda low, high: draw(st.lists(st.floats(low, high), min_size=n, max_size=n))  # noqa: E731
    norms = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=n, max_size=n))
    return floats(-5, 5), floats(-30, 30), norms, draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))


@settings(deadline=None)
@given(batches())
def test_off_policy_baseline_matches_the_formula(batch: tuple[list[float], ...]) -> None:
    rewards, log_weights, norms, ids = batch
    got = vk.off_policy_baseline(tensor(rewards), tensor(log_weights), tensor(norms), torch.tensor(ids), num_groups=4)
    expected = tensor(by_hand(rewards, log_weights, norms, ids, 4))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


@settings(deadline=None)
@given(batches(), st.randoms(use_true_random=False), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_invariances(batch: tuple[list[float], ...], random: object, constant: float, factor: float) -> None:
    """Order of the sequences, a common factor of the weights, and one of the norms change nothing."""
    rewards, log_weights, norms, ids = batch
    columns = list(zip(rewards, log_weights, norms, ids, strict=True))
    random.shuffle(columns)  # type: ignore[attr-defined]
    r, w, n, g = (list(c) for c in zip(*columns, strict=True))
    first = vk.off_policy_baseline(tensor(rewards), tensor(log_weights), tensor(norms), torch.tensor(ids), 4)
    other = vk.off_policy_baseline(tensor(r), tensor(w) + constant, tensor(n) * factor, torch.tensor(g), 4)
    torch.testing.assert_close(first, other, rtol=1e-8, atol=1e-9, equal_nan=True)


def test_int_groups_are_consecutive_ids() -> None:
    r, w, n = torch.randn(6), torch.randn(6), torch.rand(6)
    by_ids = vk.off_policy_baseline(r, w, n, torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32), num_groups=2)
    assert torch.equal(vk.off_policy_baseline(r, w, n, 3), by_ids)
    np = pytest.importorskip("numpy")
    assert torch.equal(vk.off_policy_baseline(r, w, n, np.int64(3)), by_ids)


def test_all_norms_zero_fall_back_to_the_mean_reward() -> None:
    got = vk.off_policy_baseline(
        tensor([1, 0, 0, 5]), tensor([9.0, 0, 0, 0]), tensor([0, 0, 0, 2.0]), torch.tensor([0, 0, 0, 1])
    )
    assert got[:2].tolist() == [pytest.approx(1 / 3), 5.0]


def test_all_weights_zero_fall_back_to_the_mean_reward() -> None:
    assert vk.off_policy_baseline(tensor([1, 0]), tensor([-INF, -INF]), tensor([1.0, 1]), 2).tolist() == [0.5]


@pytest.mark.parametrize("constant", [-1e4, 1e4])
def test_extreme_log_weights(constant: float) -> None:
    """exp of these is 0 or inf; the softmax is not."""
    got = vk.off_policy_baseline(
        torch.tensor([1.0, 0.0]), torch.tensor([constant, constant]), torch.tensor([3.0, 1.0]), 2
    )
    assert got.item() == 0.75
    dominated = vk.off_policy_baseline(torch.tensor([1.0, 0.0]), torch.tensor([constant, 0.0]), torch.ones(2), 2)
    assert dominated.item() == (1.0 if constant > 0 else 0.0)


def test_groups_of_one_and_unused_groups() -> None:
    """A lone sequence is its own baseline; ids that nobody has get NaN, not a number that looks like a
    baseline.
    """
    got = vk.off_policy_baseline(tensor([3, 4]), tensor([0.0, 5]), tensor([1.0, 0]), torch.tensor([2, 0]), num_groups=4)
    assert got.isnan().tolist() == [False, True, False, True]
    assert (got[0].item(), got[2].item()) == (4, 3)


def test_zero_sequences() -> None:
    empty = torch.zeros(0)
    assert vk.off_policy_baseline(empty, empty, empty, 4).shape == (0,)
    unused = vk.off_policy_baseline(empty, empty, empty, torch.zeros(0, dtype=torch.int64), 2)
    assert unused.isnan().tolist() == [True, True]


@pytest.mark.parametrize("broken", [NAN, INF], ids=str)
def test_dropped_members_take_no_part(broken: float) -> None:
    """A NaN or +inf log-weight is out of its group, whatever its norm reads; the rest of the group is as if
    it were alone.
    """
    got = vk.off_policy_baseline(tensor([1, 7, 0]), tensor([0, broken, 0]), tensor([3.0, NAN, 1]), 3)
    assert got.tolist() == [0.75]
    assert vk.off_policy_baseline(tensor([1.0]), tensor([broken]), tensor([1.0]), 1).isnan().all()


def test_no_gradient_flows_through_a_baseline() -> None:
    """b is a constant of the loss; a graph behind it would bias the gradient silently."""
    w = torch.zeros(2, requires_grad=True)
    assert not vk.off_policy_baseline(torch.tensor([1.0, 0.0]), w, torch.ones(2), 2).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_rewards(dtype: torch.dtype) -> None:
    assert vk.off_policy_baseline(torch.ones(2, dtype=dtype), torch.zeros(2), torch.ones(2), 2).dtype == dtype


# --- what the baselines are for -----------------------------------------------------------------------------


def draw_batch(seed: int, n: int = 8) -> tuple[torch.Tensor, baselines.SequenceTerms]:
    """One group: rewards, and the terms of the estimator with truncated weights and lengths that differ."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda: torch.randn(n, generator=g, dtype=torch.float64)  # noqa: E731
    big_l, lengths = 2 * randn(), torch.randint(1, 50, (n,), generator=g).double()
    terms = baselines.SequenceTerms(
        big_l, big_l.clamp(max=math.log(1.5)), randn(), (1 / (n * lengths)).log(), lengths.log()
    )
    return (randn() > 0).double() + 0.1 * randn(), terms


def baseline_of(weighting: str, rewards: torch.Tensor, terms: baselines.SequenceTerms) -> float:
    log_a = baselines.WEIGHTINGS[weighting](terms)
    ids = torch.zeros(len(rewards), dtype=torch.int64)
    return baselines.group_baselines(rewards, log_a, torch.ones_like(ids, dtype=torch.bool), ids, 1)[0].item()


@pytest.mark.parametrize("seed", range(5))
def test_estimator_weighting_minimises_the_variance_of_the_estimator_in_use(seed: int) -> None:
    """sum_i (k_i w^_i)^2 n_i (R_i - b)^2: smaller at b than at every point of a grid, and than with any other
    weighting.
    """
    rewards, terms = draw_batch(seed)
    factor = (2 * (terms.log_scale + terms.log_clipped) + terms.log_norms).exp()
    variance = lambda b: float((factor * (rewards - b).square()).sum())  # noqa: E731
    best = variance(baseline_of("estimator", rewards, terms))
    assert all(best <= variance(float(b)) for b in torch.linspace(-2, 3, 5001))
    for other in ("paper", "official", "mean", "length"):
        assert best < variance(baseline_of(other, rewards, terms)) * (1 - 1e-6), other


@pytest.mark.parametrize("seed", range(5))
def test_paper_weighting_minimises_the_variance_of_the_untruncated_sum(seed: int) -> None:
    """sum_i w_i^2 n_i (R_i - b)^2, for which the paper derives OPOB."""
    rewards, terms = draw_batch(seed)
    factor = (2 * terms.log_weights + terms.log_norms).exp()
    variance = lambda b: float((factor * (rewards - b).square()).sum())  # noqa: E731
    best = variance(vk.off_policy_baseline(rewards, terms.log_weights, terms.log_norms.exp(), len(rewards)).item())
    assert all(best <= variance(float(b)) for b in torch.linspace(-2, 3, 5001))
    assert best < variance(baseline_of("mean", rewards, terms))


@pytest.mark.parametrize("weighting", baselines.WEIGHTINGS)
def test_each_weighting_matches_its_formula(weighting: str) -> None:
    rewards, terms = draw_batch(7)
    t = terms
    columns = (t.log_weights, t.log_clipped, t.log_norms.exp(), t.log_scale.exp(), t.log_lengths.exp())
    rows = torch.stack(columns, 1).tolist()
    log_a = [brute_force.baseline_log_weight(weighting, *row[:4], round(row[4])) for row in rows]
    expected = brute_force.weighted_mean(rewards.tolist(), log_a)
    assert baseline_of(weighting, rewards, terms) == pytest.approx(expected, rel=1e-12)


# --- errors -------------------------------------------------------------------------------------------------

R = torch.tensor([1.0, 0.0, 1.0, 0.0])
Z, ONE = torch.zeros(4), torch.ones(4)
BAD_INPUT = {
    "rewards list": (([1.0], Z, ONE, 2), TypeError, r"rewards must be a torch\.Tensor, got \[1\.0\]"),
    "rewards int": (
        (R.long(), Z, ONE, 2),
        TypeError,
        r"rewards must be one of float32, float64.*rewards\.float\(\)",
    ),
    "rewards column": (
        (R[:, None], Z, ONE, 2),
        ValueError,
        r"rewards must be \[B\].*\(4, 1\).*rewards\.reshape\(-1\)",
    ),
    "rewards NaN": (
        (torch.tensor([1, NAN, 0, 0]), Z, ONE, 2),
        ValueError,
        "rewards .* must be finite, got nan at index 1",
    ),
    "rewards inf": ((torch.tensor([1, 0, 0, -INF]), Z, ONE, 2), ValueError, "got -inf at index 3"),
    "log_weights bf16": (
        (R, Z.bfloat16(), ONE, 2),
        TypeError,
        r"log_weights must be one of.*log_weights\.float\(\)",
    ),
    "log_weights shape": (
        (R, Z[:3], ONE, 2),
        ValueError,
        r"log_weights must have shape \(4,\) \(rewards\.shape\)",
    ),
    "norms shape": ((R, Z, ONE[:, None], 2), ValueError, r"score_sqnorm must have shape \(4,\)"),
    "norms negative": (
        (R, Z, torch.tensor([1, -1.0, 1, 1]), 2),
        ValueError,
        r"score_sqnorm must hold finite values >= 0.*-1\.0 at index 1",
    ),
    "norms NaN": ((R, Z, ONE * NAN, 2), ValueError, "score_sqnorm must hold finite.*got nan at index 0"),
    "norms inf": ((R, Z, ONE * INF, 2), ValueError, "score_sqnorm must hold finite.*got inf at index 0"),
    "norms device": ((R, Z, ONE.to("meta"), 2), ValueError, "score_sqnorm is on meta but rewards is on cpu"),
    "groups list": (
        (R, Z, ONE, [0, 0, 1, 1]),
        TypeError,
        r"groups must be an int .* or an int64 tensor \[B\], got \[0, 0, 1, 1\].*torch\.tensor\(ids\)",
    ),
    "groups float": ((R, Z, ONE, 2.0), TypeError, r"groups must be an int .* got 2\.0"),
    "groups bool": ((R, Z, ONE, True), TypeError, "got True"),
    "groups float tensor": ((R, Z, ONE, R), TypeError, r"groups must be one of int64, int32.*torch\.unique"),
    "groups shape": (
        (R, Z, ONE, torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"groups must have shape \(4,\) \(one group id per sequence\)",
    ),
    "groups not dividing": (
        (R, Z, ONE, 3),
        ValueError,
        "groups=3 must divide the 4 sequences.*int64 tensor of group ids",
    ),
    "groups zero": ((R, Z, ONE, 0), ValueError, "groups=0 must divide"),
    "groups negative id": (
        (R, Z, ONE, torch.tensor([0, 0, -1, 0])),
        ValueError,
        r"groups must lie in \[0, 4\), got ids from -1 to 0.*torch\.unique",
    ),
    "groups raw prompt ids": (
        (R, Z, ONE, torch.tensor([7, 7, 9, 9])),
        ValueError,
        r"\[0, 4\), got ids from 7 to 9",
    ),
    "groups beyond num_groups": (
        (R, Z, ONE, torch.tensor([0, 0, 1, 2]), 2),
        ValueError,
        r"\[0, 2\), got ids from 0 to 2",
    ),
    "groups device": (
        (R, Z, ONE, torch.zeros(4, dtype=torch.int64, device="meta"), 2),
        ValueError,
        "groups is on meta",
    ),
    "num_groups with int groups": ((R, Z, ONE, 2, 2), ValueError, "num_groups=2 goes with group ids"),
    "num_groups float": (
        (R, Z, ONE, torch.tensor([0, 0, 1, 1]), 2.0),
        TypeError,
        r"num_groups must be an int >= 0, got 2\.0",
    ),
    "num_groups negative": (
        (R, Z, ONE, torch.tensor([0, 0, 1, 1]), -1),
        ValueError,
        "num_groups must be an int >= 0, got -1",
    ),
    "num_groups tensor": (
        (R, Z, ONE, torch.tensor([0, 0, 1, 1]), torch.tensor(2)),
        TypeError,
        r"int\(num_groups\)",
    ),
}


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case: str) -> None:
    arguments, error, message = BAD_INPUT[case]
    with pytest.raises(error, match="off_policy_baseline: .*" + message):
        vk.off_policy_baseline(*arguments)
