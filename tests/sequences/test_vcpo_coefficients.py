"""The op vcpo_coefficients against `brute_force.vcpo`: every aggregation, weighting and layout, and
everything that may be broken.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vcpo_kernels as vk
from tests.sequences import brute_force
from tests.sequences.brute_force import LAYOUTS, lay_out
from vcpo_kernels.sequences.aggregation import AGGREGATIONS
from vcpo_kernels.sequences.baselines import WEIGHTINGS
from vcpo_kernels.sequences.vcpo_coefficients import METRICS, SequenceResults, vcpo_coefficients

NAN, INF = math.nan, math.inf

LENGTHS = [3, 1, 0, 2, 4, 5, 2, 1]
REWARDS = [1.0, 0.0, 0.5, 0.25, 1.0, 1.0, 2.0, 0.0]
GROUPS = [0, 0, 0, 0, 2, 2, 1, 1]  # unequal sizes; group 2 has equal rewards; group 3 is empty
NUM_GROUPS = 4
LOG_WEIGHTS = [0.3, -2.0, 0.0, 2.9, 0.1, -0.4, 5.0, -1.0]  # two above log 8


def evenly(log_weights: list[float], lengths: list[int]) -> list[list[float]]:
    """The log-ratios that `arguments` gives a sequence's tokens."""
    return [[w / n] * n if n else [] for w, n in zip(log_weights, lengths, strict=True)]


LOG_RATIOS = evenly(LOG_WEIGHTS, LENGTHS)


def arguments(
    kind: str,
    lengths: list[int] = LENGTHS,
    log_weights: list[float] = LOG_WEIGHTS,
    rewards: list[float] = REWARDS,
    groups: list[int] = GROUPS,
    num_groups: int = NUM_GROUPS,
    dtype: torch.dtype = torch.float64,
    norms: list[float] | None = None,
    **switches: Any,
) -> tuple[list[Any], list[float]]:
    """The op's arguments for sequences with the given L_i, and the norms n_i that go with them."""
    batch = lay_out(kind, lengths)
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    mu = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    logp = [m + w / max(len(m), 1) for m, w in zip(mu, log_weights, strict=True)]
    scores = [torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    seg = batch.segments
    flat = lambda ragged: batch.place([r.to(dtype) for r in ragged], fill=NAN).reshape(-1)  # noqa: E731
    op_norms = None if norms is None else torch.tensor(norms, dtype=dtype)
    call: dict[str, Any] = {
        "baseline_weighting": "paper",
        "aggregation": "seq-mean-token-mean",
        "normalize_std": True,
        "max_weight": 8.0,
        "ess_max_weight": None,
        "num_sequences": None,
        "num_tokens": None,
        "max_tokens": None,
    } | switches
    inputs = [
        *(
            flat(logp),
            flat(mu),
            flat(scores) if norms is None else None,
            op_norms,
            torch.tensor(rewards, dtype=dtype),
        ),
        *(
            torch.tensor(groups, dtype=torch.int64),
            0,
            num_groups,
            seg.mask,
            seg.offsets,
            seg.order,
            False,
            *call.values(),
        ),
    ]
    return inputs, norms if norms is not None else [float(s.sum()) for s in scores]


def check(results: SequenceResults, expected: brute_force.Expected, rtol: float = 1e-11) -> None:
    def close(name: str, got: Tensor, want: list[float]) -> None:
        target = torch.tensor(want, dtype=got.dtype)
        torch.testing.assert_close(got, target, rtol=rtol, atol=rtol, equal_nan=True, msg=lambda m: f"{name}: {m}")

    close("coefficients", results.coefficients, expected.coefficients)
    close("advantages", results.advantages, expected.advantages)
    close("baselines", results.baselines, expected.baselines)
    assert tuple(expected.metrics) == METRICS
    close("metrics", results.metrics, list(expected.metrics.values()))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_matches_brute_force(kind: str, aggregation: str, weighting: str) -> None:
    for normalize_std, max_weight in itertools.product((True, False), (8.0, 0.5, None)):
        switches = {
            "aggregation": aggregation,
            "baseline_weighting": weighting,
            "normalize_std": normalize_std,
            "max_weight": max_weight,
        }
        inputs, norms = arguments(kind, max_tokens=7.0, **switches)
        expected = brute_force.vcpo(
            LOG_WEIGHTS, LENGTHS, REWARDS, GROUPS, norms, NUM_GROUPS, max_tokens=7.0, log_ratios=LOG_RATIOS, **switches
        )
        check(vcpo_coefficients(*inputs), expected)


def test_log_weights_lengths_and_moments() -> None:
    results = vcpo_coefficients(*arguments("indexed")[0])
    torch.testing.assert_close(results.log_weights, torch.tensor(LOG_WEIGHTS, dtype=torch.float64))
    assert results.lengths.tolist() == LENGTHS
    assert results.moments.dtype == torch.float64
    live = [w for w, n in zip(LOG_WEIGHTS, LENGTHS, strict=True) if n]
    expected = [math.log(sum(math.exp(k * w) for w in live)) for k in (1, 2)] + [len(live)]
    assert results.moments.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_have_the_dtype_of_logp(dtype: torch.dtype) -> None:
    """fp32 in: fp32 out within fp32 rounding of the float64 truth, moments float64 all the same."""
    inputs, norms = arguments("padded", dtype=dtype)
    results = vcpo_coefficients(*inputs)
    assert {name: value.dtype for name, value in results._asdict().items() if name != "moments"} == {
        name: dtype for name in results._fields if name != "moments"
    }
    check(
        results,
        brute_force.vcpo(LOG_WEIGHTS, LENGTHS, REWARDS, GROUPS, norms, NUM_GROUPS, log_ratios=LOG_RATIOS),
        rtol=2e-6,
    )


sequence = st.tuples(
    st.integers(0, 4),  # length
    st.one_of(st.floats(-40, 40), st.sampled_from([NAN, INF, -INF, 1e4, -1e4])),
    st.one_of(st.sampled_from([0.0, 1.0, NAN]), st.floats(-3, 3)),  # reward: mostly ties, sometimes broken
    st.integers(0, 2),  # group
    st.one_of(st.just(0.0), st.floats(1e-3, 10)),  # norm
)


@settings(max_examples=150, deadline=None)
@given(
    sequences=st.lists(sequence, max_size=8),
    kind=st.sampled_from(LAYOUTS),
    aggregation=st.sampled_from(AGGREGATIONS),
    weighting=st.sampled_from(list(WEIGHTINGS)),
    normalize_std=st.booleans(),
)
def test_any_mixture_of_broken_and_empty_sequences(
    sequences: list[tuple[Any, ...]], kind: str, aggregation: str, weighting: str, normalize_std: bool
) -> None:
    """Empty sequences are in no count; NaN, +inf weights and NaN rewards are dropped and counted; and nothing
    else moves.
    """
    lengths, log_weights, rewards, groups, norms = (
        (list(c) for c in zip(*sequences, strict=True)) if sequences else [[]] * 5
    )
    log_weights = [w if n else 0.0 for w, n in zip(log_weights, lengths, strict=True)]
    switches = {"aggregation": aggregation, "baseline_weighting": weighting, "normalize_std": normalize_std}
    inputs, _ = arguments(kind, lengths, log_weights, rewards, groups, 3, norms=norms, max_tokens=4.0, **switches)
    results = vcpo_coefficients(*inputs)
    assert results.coefficients.isfinite().all()
    # L_i as the op sums it (1e4 / 3 * 3 is not 1e4): the rest of the arithmetic is compared from there.
    summed = results.log_weights.tolist()
    ratios = [d for n in [inputs[0] - inputs[1]] for d in n.tolist()]  # as the op rounds them
    flat_mask = torch.ones(len(ratios), dtype=torch.bool) if inputs[8] is None else inputs[8]
    counted = vk.Segments(flat_mask, *inputs[9:11], None, None).valid(len(ratios)).tolist()
    of_valid = [[d for d, valid in zip(ratios, counted, strict=True) if valid]]
    expected = brute_force.vcpo(
        summed, lengths, rewards, groups, norms, 3, max_tokens=4.0, log_ratios=of_valid, **switches
    )
    check(results, expected, rtol=1e-7)


@pytest.mark.parametrize("ess_max_weight", [2.0, 8.0])
def test_ess_of_truncated_weights(ess_max_weight: float) -> None:
    """ess_max_weight clamps what ESS is taken of, and nothing else."""
    plain = vcpo_coefficients(*arguments("padded")[0])
    results = vcpo_coefficients(*arguments("padded", ess_max_weight=ess_max_weight)[0])
    live = [min(w, math.log(ess_max_weight)) for w, n in zip(LOG_WEIGHTS, LENGTHS, strict=True) if n]
    assert results.metrics[:2].tolist() == pytest.approx(brute_force.ess_ratio(live))
    assert torch.equal(results.coefficients, plain.coefficients)
    assert torch.equal(results.metrics[2:], plain.metrics[2:])


def test_given_counts_replace_those_of_the_batch() -> None:
    for aggregation in AGGREGATIONS:
        given_counts = {
            "num_sequences": 20.0,
            "num_tokens": 100.0,
            "max_tokens": 9.0,
            "aggregation": aggregation,
        }
        inputs, norms = arguments("packed", **given_counts)
        expected = brute_force.vcpo(
            LOG_WEIGHTS, LENGTHS, REWARDS, GROUPS, norms, NUM_GROUPS, log_ratios=LOG_RATIOS, **given_counts
        )
        check(vcpo_coefficients(*inputs), expected)


def test_group_size_is_the_same_as_consecutive_ids() -> None:
    inputs, _ = arguments("padded", groups=[0, 0, 1, 1, 2, 2, 3, 3])
    by_size = [*inputs[:5], None, 2, 4, *inputs[8:]]
    for a, b in zip(vcpo_coefficients(*inputs), vcpo_coefficients(*by_size), strict=True):
        assert torch.equal(a, b)


def test_ids_out_of_range_are_dropped_and_counted_where_they_cannot_be_checked() -> None:
    """On a GPU the public function cannot look at the ids: they must neither write out of bounds nor join a
    group.
    """
    inputs, _ = arguments("padded", groups=[0, 0, 0, 0, 9, -1, 1, 1])
    results = vcpo_coefficients(*inputs)
    assert results.coefficients[4:6].tolist() == [0, 0]
    assert results.baselines[2:].isnan().all()


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_skip_first_takes_each_sequences_first_token_out(kind: str) -> None:
    """shift=True: entry 0 is in no sum and no length, and a sequence of no other token is in no count."""
    lengths = torch.tensor([3, 1, 2])
    if kind == "padded":
        mask = torch.arange(3) < lengths[:, None]
        offsets, flat_mask = torch.tensor([0, 3, 6, 9]), mask.reshape(-1)
        logp = torch.tensor([[NAN, 1.0, 2.0], [NAN, NAN, NAN], [NAN, 4.0, NAN]]).reshape(-1)
    else:
        offsets, flat_mask = torch.tensor([0, 3, 4, 6]), None
        logp = torch.tensor([NAN, 1.0, 2.0, NAN, NAN, 4.0])
    rest = [flat_mask, offsets, None, True, "paper", "token-mean", True, 8.0, None, None, None, None]
    results = vcpo_coefficients(
        logp,
        torch.zeros_like(logp),
        torch.ones_like(logp),
        None,
        torch.tensor([1.0, 9.0, 0.0]),
        None,
        3,
        1,
        *rest,
    )
    assert results.log_weights.tolist() == [3, 0, 4]
    assert results.lengths.tolist() == [2, 0, 1]
    metrics = dict(zip(METRICS, results.metrics.tolist(), strict=True))
    assert (metrics["num_sequences"], metrics["num_tokens"], metrics["nonfinite_sequences"]) == (2, 3, 0)


def test_bitwise_repeatable() -> None:
    inputs, _ = arguments("indexed", dtype=torch.float32)
    first = vcpo_coefficients(*inputs)
    for a, b in zip(first, vcpo_coefficients(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cpu_only("schemas and fakes are the same on every device")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_opcheck(kind: str) -> None:
    """Schema, fakes and AOT dispatch, with token scores and given norms, for ids and a group size."""
    op = torch.ops.vcpo_kernels.vcpo_coefficients.default
    # NaN compares unequal to itself in opcheck's own comparison: every group needs a member.
    inputs, _ = arguments(kind, groups=[0, 0, 0, 0, 2, 2, 1, 1], num_groups=3)
    inputs[:3] = [torch.nan_to_num(t) for t in inputs[:3]]
    torch.library.opcheck(op, tuple(inputs))
    inputs, _ = arguments(kind, groups=[0, 0, 0, 0, 2, 2, 1, 1], num_groups=3, norms=[1.0] * 8)
    inputs[:2] = [torch.nan_to_num(t) for t in inputs[:2]]
    inputs[5:8] = [None, 4, 2]
    torch.library.opcheck(op, tuple(inputs))
