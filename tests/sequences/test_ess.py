"""Sequence-level importance weights and ESS: in the log domain, without an epsilon, and never NaN.

The authors' code forms exp(sum), which overflows to ESS = NaN and min(1, NaN) = the full learning rate, and
adds an absolute 1e-8, which turns a common weight of 1e-5 into a ratio of 0.04. Both are tests here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vcpo_kernels as vk
from tests.sequences.brute_force import LAYOUTS, ess_ratio, lay_out
from vcpo_kernels.sequences.ess import ess_from_moments, ess_moments, merge_moments

NAN, INF = math.nan, math.inf
weights_list = st.lists(st.floats(-50, 50), min_size=1, max_size=12)


def ess(log_weights: list[float], dtype: torch.dtype = torch.float64, **kwargs: torch.Tensor) -> vk.EffectiveSampleSize:
    return vk.effective_sample_size(torch.tensor(log_weights, dtype=dtype), **kwargs)


# --- L_i ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_log_weights_match_a_python_loop(kind: str) -> None:
    lengths = [3, 0, 1, 5]
    batch = lay_out(kind, lengths)
    logp = [torch.randn(n, dtype=torch.float64) for n in lengths]
    mu = [torch.randn(n, dtype=torch.float64) for n in lengths]
    got = vk.sequence_log_weights(batch.place(logp), batch.place(mu, fill=INF), batch.segments)
    expected = [math.fsum((a - b).tolist()) for a, b in zip(logp, mu, strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_128k_tokens_lose_nothing() -> None:
    """A long rollout's log-weight is right to a float32 ulp: a float32 running sum is off by 1e-2 and more at
    this length.
    """
    n = 128 * 1024
    generator = torch.Generator().manual_seed(0)
    mu = -torch.rand(1, n, generator=generator) * 5
    logp = mu + torch.randn(1, n, generator=generator) * 0.02
    exact = math.fsum((logp - mu)[0].tolist())
    got = vk.sequence_log_weights(logp, mu, vk.Segments.padded(torch.ones(1, n)))
    assert abs(float(got) - exact) <= abs(exact) * 2**-23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_behavior_logp_in_another_dtype(dtype: torch.dtype) -> None:
    """Samplers record bf16 or numpy's float64; the difference is taken in float32 and the result keeps logp's
    dtype.
    """
    logp = torch.tensor([[-1.001, -2.0]])
    mu = torch.tensor([[-1.0, -2.5]], dtype=dtype)
    got = vk.sequence_log_weights(logp, mu, vk.Segments.padded(torch.ones(1, 2)))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([0.499]), rtol=1e-6, atol=0)


def test_half_precision_logp_is_widened_before_the_subtraction() -> None:
    logp, mu = torch.full((1, 512), -1.0, dtype=torch.bfloat16), torch.full((1, 512), -1.0009765625)
    got = vk.sequence_log_weights(logp, mu, vk.Segments.padded(torch.ones(1, 512)))
    assert got.dtype == torch.float32
    assert got.item() == 0.5


def test_log_weights_are_differentiable_in_logp_and_in_nothing_else() -> None:
    """mu is data. A recorded logp that still requires grad (same model, first epoch) must not get the
    opposite gradient.
    """
    logp = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    vk.sequence_log_weights(logp, logp, vk.Segments.padded(mask)).sum().backward()
    assert logp.grad is not None
    assert torch.equal(logp.grad, mask.float())


@pytest.mark.parametrize("kind", ["padded", "packed", "indexed"])
def test_shifted_entry_0_never_counts(kind: str) -> None:
    """shift=True has no prediction for entry 0, whose logp reads 0: counting 0 - mu_0 would shift every log-
    weight.
    """
    logits, ids = torch.randn(1, 4, 7), torch.tensor([[1, 2, 3, 4]])
    stats = vk.token_stats(logits, ids, shift=True)
    seg = {
        "padded": vk.Segments.padded(torch.ones(1, 4)),
        "packed": vk.Segments.packed(torch.tensor([0, 4])),
        "indexed": vk.Segments.indexed(torch.zeros(1, 4, dtype=torch.int64), 1),
    }[kind]
    mu = torch.tensor([[NAN, -1.0, -2.0, -3.0]])
    got = vk.sequence_log_weights(stats, mu, seg)
    torch.testing.assert_close(got, (stats.logp[:, 1:] - mu[:, 1:]).sum(1))


BAD_LOG_WEIGHTS = {
    "mask for segments": (
        lambda x, seg: vk.sequence_log_weights(x, x, torch.ones(2, 3)),
        TypeError,
        r"segments must be a Segments, got a float32 tensor of shape \(2, 3\).*Segments\.padded\(mask\)",
    ),
    "no behaviour": (
        lambda x, seg: vk.sequence_log_weights(x, None, seg),
        TypeError,
        r"behavior_logp must be a torch\.Tensor, got None",
    ),
    "integer behaviour": (
        lambda x, seg: vk.sequence_log_weights(x, x.long(), seg),
        TypeError,
        "behavior_logp must be one of bfloat16.*got a int64 tensor",
    ),
    "integer logp": (
        lambda x, seg: vk.sequence_log_weights(x.long(), x, seg),
        TypeError,
        "logp must be one of",
    ),
    "one token short": (
        lambda x, seg: vk.sequence_log_weights(x, x[:, 1:], seg),
        ValueError,
        r"behavior_logp must have the segments' shape \(2, 3\), got a float32 tensor of shape \(2, 2\)",
    ),
    "packed lengths differ": (
        lambda x, seg: vk.sequence_log_weights(x.view(-1), torch.ones(7), vk.Segments.packed(torch.tensor([0, 6]))),
        ValueError,
        r"behavior_logp must have shape \(6,\) \(as many tokens as logp\), got .* of shape \(7,\)",
    ),
}


@pytest.mark.parametrize("case", BAD_LOG_WEIGHTS)
def test_bad_input_to_log_weights(case: str) -> None:
    call, error, message = BAD_LOG_WEIGHTS[case]
    with pytest.raises(error, match="sequence_log_weights: " + message):
        call(torch.zeros(2, 3), vk.Segments.padded(torch.ones(2, 3)))


# --- ESS ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(weights_list)
def test_ess_matches_brute_force(log_weights: list[float]) -> None:
    result = ess(log_weights)
    expected = ess_ratio(log_weights)
    assert result.ess.item() == pytest.approx(expected[0], rel=1e-12)
    assert result.ratio.item() == pytest.approx(expected[1], rel=1e-12)
    assert 0 < result.ratio <= 1


@settings(deadline=None)
@given(weights_list, st.floats(-1e6, 1e6))
def test_ess_is_invariant_to_a_common_factor(log_weights: list[float], constant: float) -> None:
    """An absolute epsilon anywhere breaks this. (1e6 in float64 costs 2^-33 of each L_i, hence the
    tolerance.)
    """
    shifted = ess([x + constant for x in log_weights])
    assert shifted.ratio.item() == pytest.approx(ess(log_weights).ratio.item(), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [-1e4, 1e4, math.log(1e-5), 1e6, 0.0], ids=str)
@pytest.mark.parametrize("count", [1, 3, 64])
def test_equal_weights_have_ratio_one(value: float, count: int, dtype: torch.dtype) -> None:
    """All weights 1e-5: the authors' epsilon gives 0.04. All e^10000: exp overflows. Both are the ratio 1, to
    rounding.
    """
    ratio = ess([value] * count, dtype).ratio.item()
    assert ratio <= 1
    assert ratio == pytest.approx(1, rel=1e-7 if dtype == torch.float32 else 1e-9)


def test_one_dominant_weight_has_ratio_one_over_b() -> None:
    assert ess([1e4, -1e4, 0.0, 3.0]).ratio == 0.25


@pytest.mark.parametrize(
    ("log_weights", "expected_ess", "expected_ratio"),
    [
        ([0.0, NAN], 1, 0.5),
        ([0.0, INF], 1, 0.5),
        ([0.0, -INF], 1, 0.5),
        ([0.0, 0.0, NAN, INF], 2, 0.5),
        ([NAN, INF], 0, 0),
        ([-INF, -INF], 0, 0),
        ([], 0, 0),
        ([-7.0], 1, 1),
    ],
    ids=str,
)
def test_broken_sequences_shrink_the_ratio(
    log_weights: list[float], expected_ess: float, expected_ratio: float
) -> None:
    """NaN and +inf stay in the denominator, -inf is a weight of 0, nothing at all is 0: never NaN, which
    min(1, .) ignores.
    """
    result = ess(log_weights)
    assert (result.ess.item(), result.ratio.item()) == (expected_ess, expected_ratio)


def test_valid_takes_sequences_out_altogether() -> None:
    valid = torch.tensor([True, False, True, False])
    result = ess([0.0, NAN, 0.0, 50.0], valid=valid)
    assert (result.ess.item(), result.ratio.item()) == (2, 1)
    assert ess([0.0], valid=torch.tensor([False])).ratio == 0


@settings(deadline=None)
@given(
    log_weights=st.lists(st.one_of(st.floats(-50, 50), st.sampled_from([NAN, INF, -INF])), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=3),
)
def test_moments_of_micro_batches_merge_exactly(log_weights: list[float], cuts: list[int]) -> None:
    """ESS of a window or of all ranks from the parts' moments; a mean of the parts' ratios would be wrong."""
    whole = torch.tensor(log_weights, dtype=torch.float64)
    ends = sorted({0, len(log_weights), *(min(c, len(log_weights)) for c in cuts)})
    parts = [whole[a:b] for a, b in itertools.pairwise(ends)] + [whole[:0]]  # and an empty one
    merged = merge_moments(torch.stack([ess_moments(p) for p in parts]))
    expected = ess_moments(whole)
    torch.testing.assert_close(merged, expected, rtol=1e-13, atol=1e-13)
    for got, want in zip(ess_from_moments(merged), ess_from_moments(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_ess_carries_no_gradient() -> None:
    log_weights = torch.zeros(3, requires_grad=True)
    result = vk.effective_sample_size(log_weights)
    assert not any(getattr(result, f.name).requires_grad for f in dataclasses.fields(result))


BAD_ESS = {
    "list": (
        lambda: vk.effective_sample_size([0.0]),
        TypeError,
        r"log_weights must be a torch\.Tensor, got \[0\.0\]",
    ),
    "bf16": (
        lambda: vk.effective_sample_size(torch.zeros(2, dtype=torch.bfloat16)),
        TypeError,
        r"log_weights must be one of float32, float64.*log_weights\.float\(\)",
    ),
    "column": (
        lambda: vk.effective_sample_size(torch.zeros(2, 1)),
        ValueError,
        r"log_weights must be \[B\].*\(2, 1\)",
    ),
    "valid dtype": (
        lambda: vk.effective_sample_size(torch.zeros(2), torch.ones(2)),
        TypeError,
        "valid must be one of bool, got a float32.*valid > 0",
    ),
    "valid shape": (
        lambda: vk.effective_sample_size(torch.zeros(2), torch.ones(3, dtype=torch.bool)),
        ValueError,
        r"valid must have shape \(2,\)",
    ),
    "valid device": (
        lambda: vk.effective_sample_size(torch.zeros(2), torch.ones(2, dtype=torch.bool, device="meta")),
        ValueError,
        "valid is on meta but log_weights is on cpu",
    ),
}


@pytest.mark.parametrize("case", BAD_ESS)
def test_bad_input_to_ess(case: str) -> None:
    call, error, message = BAD_ESS[case]
    with pytest.raises(error, match="effective_sample_size: " + message):
        call()


def test_errors_do_not_print_a_whole_list() -> None:
    """A trainer that passes ten thousand floats gets a line, not a page."""
    with pytest.raises(TypeError) as caught:
        vk.effective_sample_size([0.0] * 10_000)
    assert len(str(caught.value)) < 300
