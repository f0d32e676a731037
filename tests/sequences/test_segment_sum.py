"""The ops segment_sum and segment_spread as torch.library sees them, and against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vcpo_kernels as vk
from tests.sequences.brute_force import LAYOUTS, lay_out
from vcpo_kernels.sequences.segment_sum import segment_spread, segment_sum

LENGTHS = [3, 0, 1, 4]


def arguments(kind: str, lengths: list[int] = LENGTHS) -> tuple[Tensor, tuple[Tensor | None, Tensor, Tensor | None]]:
    """Token values with 7 at the tokens that do not count, and (mask, offsets, order)."""
    batch = lay_out(kind, lengths)
    values = batch.place([torch.arange(1.0, n + 1, dtype=torch.float64) for n in lengths], fill=7.0)
    seg = batch.segments
    return values.reshape(-1), (seg.mask, seg.offsets, seg.order)


@pytest.mark.cpu_only("schemas and fakes are the same on every device")
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_opcheck(kind: str, requires_grad: bool) -> None:
    """Schema, fakes, autograd registration and AOT dispatch (static and dynamic shapes) agree with the real
    op.
    """
    values, segments = arguments(kind)
    torch.library.opcheck(torch.ops.vcpo_kernels.segment_sum.default, (values.requires_grad_(requires_grad), *segments))
    per_sequence = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.vcpo_kernels.segment_spread.default, (per_sequence, *segments, values.numel()))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_spread_writes_each_valid_token_and_zero_elsewhere(kind: str) -> None:
    """Every output element is written (conftest poisons memory): 0, not garbage, outside the mask."""
    batch = lay_out(kind, LENGTHS)
    seg = batch.segments
    per_sequence = torch.tensor([1.0, 2.0, 3.0, 4.0])
    n = int(torch.tensor(batch.shape).prod())
    tokens = segment_spread(per_sequence, seg.mask, seg.offsets, seg.order, n)
    expected = batch.place([x.expand(k) for x, k in zip(per_sequence, LENGTHS, strict=True)], fill=0.0)
    assert torch.equal(tokens, expected.reshape(-1))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_spread_of_nan_reaches_only_its_own_tokens(kind: str) -> None:
    """0 * NaN again, from the other side: a broken sequence must not touch its neighbours or the padding."""
    batch = lay_out(kind, LENGTHS)
    seg = batch.segments
    n = int(torch.tensor(batch.shape).prod())
    tokens = segment_spread(torch.tensor([1.0, 2.0, torch.nan, 4.0]), seg.mask, seg.offsets, seg.order, n)
    assert tokens.isnan().nonzero().flatten().tolist() == batch.positions[2].tolist()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), max_size=6), kind=st.sampled_from(LAYOUTS), seed=st.integers(0, 999))
def test_spread_is_the_adjoint_of_sum(lengths: list[int], kind: str, seed: int) -> None:
    """<sum(x), y> = <x, spread(y)>: each is the other's backward pass, so this must hold."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    values, segments = arguments(kind, lengths)
    x = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    y = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    left = (segment_sum(x, *segments) * y).sum()
    right = (x * segment_spread(y, *segments, x.numel())).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_spread_derivatives(kind: str) -> None:
    values, segments = arguments(kind)
    y = torch.randn(len(LENGTHS), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: segment_spread(t, *segments, values.numel()), y)
    assert torch.autograd.gradgradcheck(lambda t: segment_spread(t, *segments, values.numel()), y)


def test_offsets_past_the_end_are_clamped() -> None:
    """Where the offsets cannot be read (a GPU), a wrong cu_seqlens must stay inside the tensor."""
    offsets = torch.tensor([0, 2, 9])
    assert segment_sum(torch.ones(4), None, offsets, None).tolist() == [2.0, 2.0]
    assert segment_spread(torch.tensor([1.0, 2.0]), None, offsets, None, 4).tolist() == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_bitwise_repeatable(kind: str) -> None:
    _, segments = arguments(kind, [500, 3, 700])
    values = torch.randn(int(torch.tensor(lay_out(kind, [500, 3, 700]).shape).prod()))
    first = segment_sum(values, *segments)
    assert all(torch.equal(first, segment_sum(values, *segments)) for _ in range(5))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_public_spread_is_the_adjoint_of_sum(kind: str) -> None:
    """Segments.spread in the batch's own shape: <sum(x), y> = <x, spread(y)>, and so it differentiates."""
    batch = lay_out(kind, LENGTHS)
    x, y = torch.randn(batch.shape, dtype=torch.float64), torch.randn(len(LENGTHS), dtype=torch.float64)
    spread = batch.segments.spread(y.requires_grad_(), like=x)
    assert spread.shape == x.shape
    torch.testing.assert_close((x * spread).sum(), torch.dot(batch.segments.sum(x), y))
    assert torch.autograd.gradcheck(lambda y: batch.segments.spread(y, like=x), y)


@pytest.mark.cpu_only("checks read values only on a CPU")
def test_spread_knows_its_shape_or_says_so() -> None:
    mask = torch.ones(2, 3)
    assert vk.Segments.padded(mask).spread(torch.ones(2)).shape == (2, 3)
    packed = vk.Segments.packed(torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=r"Segments.spread: packed segments without a mask.*like=stats.logp"):
        packed.spread(torch.ones(2))
    with pytest.raises(ValueError, match=r"per_sequence must have shape \(2,\)"):
        packed.spread(torch.ones(3), like=torch.ones(5))
    with pytest.raises(ValueError, match="like must hold the 5 tokens"):
        packed.spread(torch.ones(2), like=torch.ones(4))
    with pytest.raises(TypeError, match=r"per_sequence must be one of.*per_sequence.float\(\)"):
        packed.spread(torch.ones(2, dtype=torch.int64), like=torch.ones(5))
