"""Sequence kernels against the reference: segment_sum, segment_spread, vcpo_coefficients, the whole loss."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels.backends.reference import segment_spread as reference_spread
from vcpo_kernels.backends.reference import segment_sum as reference_sum
from vcpo_kernels.backends.reference import vcpo_coefficients as reference_coefficients
from vcpo_kernels.sequences import baselines
from vcpo_kernels.sequences.aggregation import AGGREGATIONS
from vcpo_kernels.sequences.vcpo_coefficients import SequenceResults

pytest.importorskip("triton")
from vcpo_kernels.backends.triton import launch, segment_spread, segment_sum, vcpo_coefficients

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the inf that the interpreter meets

LAYOUTS = ("padded", "packed", "indexed", "unmasked")


def layout(kind: str) -> tuple[int, Tensor | None, Tensor, Tensor | None]:
    """N, mask, offsets, order of six sequences: empty ones, a wholly masked one, one longer than a block."""
    if kind == "padded":
        mask = torch.rand(6, 700) < 0.5
        mask[2] = False
        seg = vk.Segments.padded(mask)
        return mask.numel(), seg.mask, seg.offsets, seg.order
    offsets = torch.tensor([0, 0, 9, 1200, 1201, 1201, 1300])
    if kind == "unmasked":
        return 1310, None, offsets, None
    mask = torch.rand(1310) < 0.7
    if kind == "packed":
        mask[:9] = False
        offsets[-1] = 5000  # every reader clamps it to N
        return 1310, mask, offsets, None
    ids = torch.randint(-1, 6, (1310,))
    ids[ids == 3] = 4
    seg = vk.Segments.indexed(ids, 6, mask)
    return 1310, seg.mask, seg.offsets, seg.order


def on(device: torch.device, *values: object) -> list:
    return [v.to(device) if isinstance(v, Tensor) else v for v in values]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_segment_sum(kind: str, device: torch.device) -> None:
    n, *segments = layout(kind)
    values = torch.randn(n) * 1e3
    if segments[0] is not None:
        values[~segments[0]] = float("nan")  # never added
    expected = reference_sum.forward(values, *segments)
    got = segment_sum.forward(*on(device, values, *segments))
    assert got.dtype == values.dtype
    torch.testing.assert_close(got.cpu(), expected, rtol=2.0**-23, atol=0)
    assert torch.equal(got, segment_sum.forward(*on(device, values, *segments)))


def test_segment_sum_of_a_long_sequence_loses_nothing(device: torch.device) -> None:
    """128k tokens: an fp32 sum would be off in the fourth digit."""
    values = torch.full((131072,), 0.1)
    offsets = torch.tensor([0, 131072])
    got = segment_sum.forward(*on(device, values, None, offsets, None))
    assert float(got) == float(values.double().sum().float())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_segment_spread(kind: str, device: torch.device) -> None:
    n, *segments = layout(kind)
    per_sequence = torch.randn(6)
    expected = reference_spread.forward(per_sequence, *segments, n)
    assert torch.equal(segment_spread.forward(*on(device, per_sequence, *segments), n).cpu(), expected)


def test_no_sequences_and_no_tokens(device: torch.device) -> None:
    none, zero = torch.empty(0, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    assert segment_sum.forward(none, None, zero, None).shape == (0,)
    assert torch.equal(segment_spread.forward(none, None, zero, None, 3).cpu(), torch.zeros(3))
    two = torch.zeros(3, dtype=torch.int64, device=device)
    assert torch.equal(segment_sum.forward(none, None, two, None).cpu(), torch.zeros(2))
    assert segment_spread.forward(torch.ones(2, device=device), None, two, None, 0).shape == (0,)


def arguments(
    batch: int, length: int = 9, groups: str = "int", order: bool = False, weighting: str = "paper",
    aggregation: str = "seq-mean-token-mean", normalize: bool = True, max_weight: float | None = 8.0,
    ess_max_weight: float | None = None, skip_first: bool = False, spread: float = 1.0,
) -> list:  # fmt: skip
    """The op's arguments for a padded batch: one sequence empty, one NaN, one group of equal rewards."""
    n = batch * length
    logp = torch.randn(n) - 3
    behavior = logp + torch.randn(n) * spread
    scores, rewards = torch.rand(n), (torch.rand(batch) < 0.5).float() + torch.rand(batch).round(decimals=1)
    mask = torch.rand(n) < 0.7
    mask[:length] = False
    if batch > 5:
        logp[3 * length : 4 * length] = float("nan")
        rewards[4:6] = 1.0
    ids = torch.randint(0, max(batch // 3, 1), (batch,)) if groups == "ids" else None
    size, count = (0, batch) if groups == "ids" else (2, batch // 2)
    tokens = torch.randperm(n) if order else None
    return [
        logp, behavior, scores, None, rewards, ids, size, count, mask,
        torch.arange(batch + 1) * length, tokens, skip_first,
        weighting, aggregation, normalize, max_weight, ess_max_weight, None, None, 17.0,
    ]  # fmt: skip


def check(call: list, device: torch.device) -> SequenceResults:
    got = SequenceResults(*(t.cpu() for t in vcpo_coefficients.forward(*on(device, *call))))
    expected = reference_coefficients.forward(*call)
    for name, ours, want in zip(SequenceResults._fields, got, expected, strict=True):
        assert ours.dtype == want.dtype, name
        torch.testing.assert_close(
            ours, want, rtol=2e-6, atol=2e-6, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    return got


CONFIGS = list(itertools.product(baselines.WEIGHTINGS, AGGREGATIONS))


@pytest.mark.parametrize(("weighting", "aggregation"), CONFIGS)
def test_coefficients_in_every_configuration(weighting: str, aggregation: str, device: torch.device) -> None:
    turn = CONFIGS.index((weighting, aggregation))
    call = arguments(
        batch=12,
        groups=("int", "ids")[turn % 2],
        order=turn % 3 == 0,
        weighting=weighting,
        aggregation=aggregation,
        normalize=turn % 4 < 2,
        max_weight=(8.0, None, 0.3)[turn % 3],
        ess_max_weight=(None, 2.0)[turn // 2 % 2],
        skip_first=turn % 5 > 1,
    )
    check(call, device)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("groups", ["int", "ids"])
def test_coefficients_of_small_batches(batch: int, groups: str, device: torch.device) -> None:
    check(arguments(batch, groups=groups), device)


def test_coefficients_of_huge_log_weights(device: torch.device) -> None:
    """|L| of 1e4 both ways: exp(L) is never formed unclipped."""
    call = arguments(8, spread=3000.0)
    call[10] = None
    got = check(call, device)
    live = got.lengths > 0
    assert got.log_weights[live & got.log_weights.isfinite()].abs().max() > 5e3
    assert got.coefficients.isfinite().all()
    shifted = arguments(8)
    shifted[1] = shifted[0] + 1e3
    assert check(shifted, device).metrics[1].isfinite()


def test_coefficients_of_one_sequence_and_of_groups_of_one(device: torch.device) -> None:
    call = arguments(4)
    call[6:8] = 1, 4
    assert (check(call, device).advantages == 0).all()
    single = [
        torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([0.5]), None, torch.tensor([1.0]), None,
        1, 1, None, torch.tensor([0, 1]), None, *call[11:],
    ]  # fmt: skip
    assert float(check(single, device).metrics[1]) == 1.0


def test_coefficients_where_every_token_is_masked(device: torch.device) -> None:
    call = arguments(6)
    call[8] = torch.zeros_like(call[8])
    got = check(call, device)
    assert (got.coefficients == 0).all()
    assert got.metrics.isfinite().all()


def test_coefficients_from_given_norms_and_counts(device: torch.device) -> None:
    """Measured norms, one group's all zero (its baseline is the mean); counts of a larger step."""
    call = arguments(8, aggregation="token-mean")
    norms = torch.rand(8) * 5
    norms[6:8] = 0.0
    call[2:4] = None, norms
    call[17:19] = 64.0, 1000.0
    check(call, device)
    call[13] = "seq-mean-token-sum"
    check(call, device)


def test_bad_rewards_ids_and_norms_are_dropped_and_counted(device: torch.device) -> None:
    """On a GPU the host checks nothing: NaN rewards, wild ids, infinite norms cost their sequence only."""
    call = arguments(12, groups="ids")
    call[2:4] = None, torch.rand(12)
    call[3][8] = math.inf
    call[4][7] = float("nan")
    call[4][9] = math.inf
    call[5][10], call[5][11] = -1, 12
    got = check(call, device)
    dropped = [3, 7, 8, 9, 10, 11]
    assert (got.coefficients[dropped] == 0).all()
    assert float(got.metrics[4]) == len(dropped)


@pytest.mark.parametrize("groups", ["int", "ids"])
def test_coefficients_of_more_sequences_than_a_block(
    groups: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 8, so that every loop over sequences, members and groups takes several turns."""
    small = replace(launch.launches(device), sequence=launch.SequenceLaunch(block=8, num_warps=1))
    monkeypatch.setattr(vcpo_coefficients, "launches", lambda device: small)
    call = arguments(36, length=2)
    call[6:8] = 18, 2
    if groups == "ids":
        call[5:8] = torch.randint(0, 12, (36,)), 0, 12
    check(call, device)
    first, second = (vcpo_coefficients.forward(*on(device, *call)) for _ in range(2))
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second, strict=True))


def test_three_launches_up_to_the_coefficients(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(vcpo_coefficients, name)

        def __getitem__(self, grid: tuple[int, ...]):
            launched.append(self.name)
            return self.kernel[grid] if len(launched) <= 3 else lambda *args, **kwargs: None

    for name in ("sequence_kernel", "batch_kernel", "group_kernel", "metrics_kernel"):
        monkeypatch.setattr(vcpo_coefficients, name, Counted(name))
    call = arguments(8)
    got, expected = vcpo_coefficients.forward(*on(device, *call)), reference_coefficients.forward(*call)
    assert launched == ["sequence_kernel", "batch_kernel", "group_kernel", "metrics_kernel"]
    torch.testing.assert_close(got.coefficients.cpu(), expected.coefficients, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.moments.cpu(), expected.moments)


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_the_whole_loss_on_triton(kind: str, device: torch.device) -> None:
    """Logits to loss to gradient of the logits, through the public functions."""
    logits, ids = torch.randn(4, 6, 40), torch.randint(0, 40, (4, 6))
    mask = torch.rand(4, 6) < 0.8
    behavior, rewards = -torch.rand(4, 6) * 4, torch.tensor([1.0, 0.0, 0.5, 2.0])
    results = {}
    for backend, where in (("reference", torch.device("cpu")), ("triton", device)):
        leaf = logits.to(where).requires_grad_()
        seg = vk.Segments.padded(mask.to(where))
        if kind == "packed":
            seg = vk.Segments.packed(torch.tensor([0, 6, 12, 18, 24], device=where), mask.reshape(-1).to(where))
        with vk.use_backend(backend):
            shape = (1, 24, 40) if kind == "packed" else leaf.shape
            stats = vk.token_stats(
                leaf.view(shape), ids.to(where).view(shape[:2]), mask.to(where).view(shape[:2]), shift=True
            )
            mu = behavior.to(where).view(shape[:2])
            out = vk.vcpo_loss(stats, mu, rewards.to(where), 2, seg)
            out.loss.backward()
        results[backend] = out.loss.detach().cpu(), leaf.grad.cpu(), out.coefficients.cpu()
    for ours, exact in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
