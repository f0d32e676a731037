"""outer_sqnorm: the squared norm of a sum of outer products, in both forms, against forming it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vcpo_kernels.backends.reference.outer_sqnorm import COSTS
from vcpo_kernels.sequence_gradients.outer_sqnorm import FormCosts, outer_sqnorm, outer_sqnorms

FORMS = ("ghost", "instantiated", "auto")


def formed(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """In float64, with each product in memory."""
    pairs = zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    return torch.stack([(left[b:e].double().T @ right[b:e].double()).square().sum() for b, e in pairs])


def assert_close(got: Tensor, left: Tensor, right: Tensor, offsets: Tensor) -> None:
    """Relative 2e-6, and what fp32 sums of terms of both signs cost: 2e-7 of the same sum without signs."""
    want = formed(left, right, offsets)
    bound = 2e-6 * want + 2e-7 * formed(left.abs(), right.abs(), offsets)
    assert bool(((got.double().cpu() - want).abs() <= bound).all()), f"{got} for {want}"


def batch(lengths: tuple[int, ...], p: int, q: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(rows, p).to(dtype), torch.randn(rows, q).to(dtype), offsets


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("p", "q"), ((1, 1), (7, 300), (130, 33)))
def test_matches_the_formed_product(form: str, p: int, q: int, dtype: torch.dtype) -> None:
    """Lengths on both sides of a strip; an empty sequence; one of a single row."""
    left, right, offsets = batch((5, 0, 1, 200, 33), p, q, dtype)
    got = outer_sqnorm(left, right, offsets, 200, form)
    assert got.dtype == torch.float32
    assert_close(got, left, right, offsets)


@pytest.mark.parametrize("form", FORMS)
def test_float64_keeps_its_digits(form: str) -> None:
    left, right, offsets = batch((40, 3), 9, 11, torch.float64)
    got = outer_sqnorm(left, right, offsets, 40, form)
    torch.testing.assert_close(got, formed(left, right, offsets), rtol=1e-13, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_terms_that_cancel(form: str) -> None:
    """Rows and their negatives: a norm a million times smaller than the sum of the terms' sizes stays small."""
    left, right = torch.randn(64, 32), torch.randn(64, 48)
    left, right = torch.cat([left, -left]), torch.cat([right, right])
    got = outer_sqnorm(left, right, torch.tensor([0, 128]), 128, form)
    scale = outer_sqnorm(left.abs(), right.abs(), torch.tensor([0, 128]), 128, form)
    assert float(got / scale) < 1e-6


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40))
def test_the_forms_agree(lengths: list[int], p: int, q: int) -> None:
    left, right, offsets = batch(tuple(lengths), p, q, torch.float32)
    ghost, instantiated = (outer_sqnorm(left, right, offsets, max(lengths), form) for form in ("ghost", "instantiated"))
    torch.testing.assert_close(ghost, instantiated, rtol=2e-5, atol=1e-4)


def test_views_and_repeats_are_bitwise_equal() -> None:
    left, right, offsets = batch((30, 20), 16, 24, torch.float32)
    wide = torch.randn(50, 40)
    wide[:, :16] = left
    for form in FORMS:
        want = outer_sqnorm(left, right, offsets, 30, form)
        assert torch.equal(outer_sqnorm(wide[:, :16], right, offsets, 30, form), want)


@pytest.mark.parametrize("form", FORMS)
def test_several_lefts_share_a_right(form: str) -> None:
    """As each on its own would have it."""
    left, right, offsets = batch((30, 0, 20), 16, 24, torch.float32)
    lefts = [left, torch.randn(50, 5), left[:, :3]]
    got = outer_sqnorms(lefts, right, offsets, 30, form)
    assert got.shape == (3, 3)
    for of_one, a in zip(got, lefts, strict=True):
        assert_close(of_one, a, right, offsets)


def test_no_sequences() -> None:
    assert outer_sqnorm(torch.zeros(0, 3), torch.zeros(0, 4), torch.tensor([0]), 0).shape == (0,)


def test_the_cheaper_form_is_chosen() -> None:
    """Short sequences of wide layers by pairs, long ones of narrow layers by tiles."""
    assert COSTS.form(64, 512, 512) == "ghost"
    assert COSTS.form(4096, 512, 512) == "instantiated"
    assert COSTS.form(256, 8, 4096) == "instantiated"  # a LoRA factor is small whatever it is multiplied with
    assert FormCosts(0.5, 0, 0).form(99, 100, 100) == "ghost"
    assert FormCosts(0.5, 0, 0).form(101, 100, 100) == "instantiated"


@pytest.mark.cpu_only("checks read values only on a CPU")
def test_errors_name_the_form() -> None:
    left, right, offsets = batch((3,), 2, 2, torch.float32)
    with pytest.raises(ValueError, match=r"form must be one of 'ghost', 'instantiated', 'auto', got 'best'"):
        outer_sqnorm(left, right, offsets, 3, "best")


@pytest.mark.cpu_only("schemas and fakes are the same on every device")
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    left, right, offsets = batch((4, 3), 5, 6, torch.float32)
    torch.library.opcheck(torch.ops.vcpo_kernels.outer_sqnorm, ([left, left[:, :2]], right, offsets, 4, form))
