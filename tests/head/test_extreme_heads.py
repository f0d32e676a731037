"""A bias at a large finite fill, as constrained decoding puts on a head, and near-greedy temperatures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vcpo_kernels as vk
from tests.head.head_inputs import HeadInputs, distance, make, through_head, through_logits

LEAST = 1e-3


def filled(fill: float, entropy: bool, choices: int) -> HeadInputs:
    """The first `choices` entries can be chosen. Tokens are among them, but the last."""
    x = make(bias=True, entropy=entropy)
    assert x.bias is not None
    bias = torch.where(torch.arange(len(x.bias)) < choices, x.bias, fill)
    ids = x.token_ids % choices
    ids[-1, -1] = choices + 5
    return replace(x, bias=bias, token_ids=ids)


@pytest.mark.parametrize("choices", (1, 7))
@pytest.mark.parametrize("fill", (-1e4, -1e9, -1e10, -1e30, -3e38))
@pytest.mark.parametrize("memory", ("lean", "fast"))
def test_bias_at_a_fill(implementation: str, memory: str, fill: float, choices: int) -> None:
    """The lean backward takes the vocabulary by blocks, most of them nothing but the fill, and log p from what was saved."""
    for entropy in (False, True):
        x = filled(fill, entropy, choices)
        stats, grads = through_head(x, memory=memory, chunk_bytes=5000, temperature=0.9)
        want, want_grads = through_logits(x, temperature=0.9)
        for field in ("logp", "entropy", "score_sqnorm", "lse"):
            torch.testing.assert_close(getattr(stats, field).double(), getattr(want, field), rtol=4e-6, atol=4e-6)
        for got, expected in zip(grads, want_grads, strict=True):
            assert distance(got, expected) <= 4e-6


@pytest.mark.parametrize("fill", (-1e4, -1e10, -3e38))
def test_known_coefficients_with_a_fill(implementation: str, fill: float) -> None:
    x = filled(fill, False, 7)
    leaves = x.leaves()
    loss, _ = vk.linear_weighted_logp(*leaves[:2], x.token_ids, x.g, leaves[2], chunk_bytes=5000)
    for got, expected in zip(torch.autograd.grad(loss, leaves), through_logits(x)[1], strict=True):
        assert distance(got, expected) <= 4e-6


@pytest.mark.parametrize("memory", ("lean", "fast"))
def test_least_temperature(implementation: str, memory: str) -> None:
    """What fp32's GEMM rounds, divided by it, is still far below a percent."""
    for entropy in (False, True):
        x = make(entropy=entropy)
        stats, grads = through_head(x, memory=memory, temperature=LEAST)
        want, want_grads = through_logits(x, temperature=LEAST)
        torch.testing.assert_close(stats.logp.double(), want.logp, rtol=2e-6, atol=2e-3)
        for got, expected in zip(grads, want_grads, strict=True):
            assert distance(got, expected) <= 2e-3


def test_below_it_is_an_error() -> None:
    """There logits that differ by an ulp between forward and backward would be e^10 apart; float64 has the digits."""
    x = make()
    for call in (vk.linear_token_stats, lambda h, w, i, **k: vk.linear_weighted_logp(h, w, i, x.g, **k)):
        with pytest.raises(ValueError, match=r"temperature must be at least 0.001, got 0.0001.*token_stats"):
            call(x.hidden, x.weight, x.token_ids, temperature=1e-4)
    with vk.use_backend("reference"):
        double = through_head(replace(x, hidden=x.hidden.double(), weight=x.weight.double()), temperature=1e-4)
    want = through_logits(x, temperature=1e-4)
    assert distance(double[1][0], want[1][0]) <= 1e-9
