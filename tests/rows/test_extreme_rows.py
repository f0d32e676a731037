"""Rows and temperatures at the ends of fp32's range: large finite fills, and temperatures that stand for greedy.

Held against torch's own log_softmax in float64, not the reference, which is one of the implementations under test. The
triton backend has its part of this in tests/backends/triton.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.rows import row_inputs
from tests.rows.row_checks import assert_gradient, assert_statistics, run
from tests.rows.test_score_rows import score_rows
from vcpo_kernels.core.dtypes import wide

FILLS = (-1e4, -3e4, -65504.0, -1e5, -1e6, -1e7, -1e9, -1e10, -1e20, -1e30, "lowest")
LOW = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def fills(dtype: torch.dtype) -> list[float]:
    lowest = torch.finfo(dtype).min
    return [f for f in (lowest if fill == "lowest" else float(fill) for fill in FILLS) if f >= lowest]


def exact(
    logits: Tensor, ids: Tensor, g: Tensor, h: Tensor, temperature: float, softcap: float | None = None
) -> tuple[vk.TokenStats, Tensor]:
    """Statistics and gradient of g . logp + h . entropy in float64."""
    z = logits.detach().double().clone().requires_grad_()
    x = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(x / temperature, -1)
    p = log_p.exp()
    logp = log_p.gather(-1, ids[:, None])[:, 0]
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    ((g.double() * logp).sum() + (h.double() * entropy).sum()).backward()
    chosen = torch.zeros_like(p).scatter(-1, ids[:, None], 1.0)
    lse = torch.logsumexp(x / temperature, -1)
    assert z.grad is not None
    return vk.TokenStats(*(s.detach() for s in (logp, entropy, (chosen - p).square().sum(-1), lse))), z.grad


def one_choice(fill: float, dtype: torch.dtype, vocabulary: int) -> tuple[Tensor, Tensor]:
    """One entry a row, and nothing else that could be chosen; it is the token."""
    z = torch.full((4, vocabulary), fill, dtype=dtype)
    ids = torch.tensor([0, vocabulary - 1, vocabulary // 2, 1 % vocabulary])
    return z.scatter_(-1, ids[:, None], torch.tensor([[0.5], [-3.0], [0.0], [100.0]]).to(dtype)), ids


@pytest.mark.parametrize("vocabulary", (2, 10, 4097))
@pytest.mark.parametrize("temperature", (1.0, 0.6, 1e-3))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_one_choice_left(implementation: str, dtype: torch.dtype, temperature: float, vocabulary: int) -> None:
    """Constrained decoding fills with -1e10, or with the dtype's lowest number: exactly no loss, entropy and gradient. The
    others' u lies where an ulp is a thousand binades, or outside fp32.
    """
    assert_one_choice(dtype, temperature, vocabulary)


@pytest.mark.parametrize("temperature", (1.0, 0.6, 1e-3))
def test_one_choice_left_in_float64(temperature: float) -> None:
    """finfo.min is -1.8e308 here, which 0.6 divides into -inf."""
    assert_one_choice(torch.float64, temperature, 10)


def assert_one_choice(dtype: torch.dtype, temperature: float, vocabulary: int) -> None:
    for fill in fills(dtype):
        z, ids = one_choice(fill, dtype, vocabulary)
        stats, grad = run(z, ids, torch.ones(4, dtype=wide(dtype)), None, temperature=temperature)
        for s in (stats.logp, stats.entropy, stats.score_sqnorm):
            assert s.tolist() == [0.0] * 4, fill
        assert bool((grad == 0).all()), fill
        want = z.gather(-1, ids[:, None])[:, 0].double() / temperature
        torch.testing.assert_close(stats.lse.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("softcap", (None, 30.0))
@pytest.mark.parametrize("temperature", (0.6, 50.0))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_fills_among_others(implementation: str, dtype: torch.dtype, temperature: float, softcap: float | None) -> None:
    """A tenth of the vocabulary left, a first block with none, a row of nothing but the fill; tokens on either side."""
    for fill in fills(dtype)[::3]:
        z = torch.randn(6, 4500).double()
        z[torch.rand(z.shape) < 0.9] = fill
        z[1:4, :4200] = fill
        z[4] = fill
        z = z.to(dtype)
        ids = z.argmax(-1)
        ids[3] = 7  # at the fill
        g, h = torch.randn(6), torch.randn(6)
        settings = {"temperature": temperature, "softcap": softcap}
        want, want_grad = exact(z, ids, g, h, **settings)
        size = (g.abs() + h.abs() * (1 + want.entropy)) / temperature
        stats, grad = run(z, ids, g, h, **settings)
        keep = want.logp.abs() < torch.finfo(torch.float32).max  # -3e38 / 0.6 is -inf in fp32
        assert bool((stats.logp[~keep] == want.logp[~keep].float()).all())
        assert bool(stats.entropy.isfinite().all())
        finite = keep & (want.lse.abs() < torch.finfo(torch.float32).max)
        part = [
            vk.TokenStats(*(getattr(s, f)[finite] for f in ("logp", "entropy", "score_sqnorm", "lse")))
            for s in (stats, want)
        ]
        assert_statistics(*part)
        assert_gradient(grad, want_grad, size, want)
        _, scores = score_rows(z, ids, g, **settings)
        assert_gradient(scores, exact(z, ids, g, torch.zeros(6), **settings)[1], g.abs() / temperature, want)


def greedy_rows(spread: float, dtype: torch.dtype, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Of the tokens the first two are the likeliest, one is the second; two rows have two of equal size at their top."""
    z = (torch.randn(8, vocabulary) * spread).clamp(-6e4, 6e4).to(dtype)
    ids = torch.randint(0, vocabulary, (8,))
    top = z.float().topk(2, -1).indices
    ids[:2], ids[2] = top[:2, 0], top[2, 1]
    z[3, top[3, 1]], z[4, top[4, 1]] = z[3, top[3, 0]], z[4, top[4, 0]]
    ids[3] = top[3, 0]
    return z, ids


@pytest.mark.parametrize("temperature", LOW)
@pytest.mark.parametrize("spread", (3.0, 1e4))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_near_greedy(implementation: str, dtype: torch.dtype, spread: float, temperature: float) -> None:
    """|x| / T up to 5e10. p is as exact as anywhere, though fp32 has no room for it in the saved lse, nor in logp: one
    rounding of the output, and no more, which `assert_gradient` alone would allow.
    """
    for vocabulary in (5, 4500):
        z, ids = greedy_rows(spread, dtype, vocabulary)
        g, h = torch.rand(8) + 0.1, torch.rand(8) + 0.1
        want, want_grad = exact(z, ids, g, h, temperature)
        stats, grad = run(z, ids, g, h, temperature=temperature)
        assert_statistics(stats, want)
        fits = want_grad.abs() < torch.finfo(dtype).max
        size = (g + h * (1 + want.entropy)) / temperature
        small = vk.TokenStats(*(s.clamp(-32.0, 32.0) for s in (want.logp, want.entropy, want.score_sqnorm, want.lse)))
        assert_gradient(torch.where(fits, grad, 0), torch.where(fits, want_grad, 0.0), size, small)
        scores_stats, scores = score_rows(z, ids, g, temperature=temperature)
        assert_statistics(scores_stats, want)
        _, want_scores = exact(z, ids, g, torch.zeros(8), temperature)
        fits = want_scores.abs() < torch.finfo(dtype).max
        assert_gradient(torch.where(fits, scores, 0), torch.where(fits, want_scores, 0.0), g / temperature, small)


@pytest.mark.parametrize("temperature", (1e-10, 1e-20, 1e-30))
def test_down_to_the_least_temperature(implementation: str, temperature: float) -> None:
    z, ids = greedy_rows(3.0, torch.float32, 100)
    ones = torch.ones(8)
    want, want_grad = exact(z, ids, ones, ones, temperature)
    stats, grad = run(z, ids, ones, ones, temperature=temperature)
    assert_statistics(stats, want)
    torch.testing.assert_close(grad.double() * temperature, want_grad * temperature, rtol=1e-5, atol=1e-5)


def test_below_it_is_an_error() -> None:
    """Not a NaN; float64, which has the range, is served."""
    z, ids = greedy_rows(3.0, torch.float32, 100)
    for call in (vk.token_stats, lambda *a, **k: vk.weighted_logp(*a, torch.ones(8), **k)):
        with pytest.raises(ValueError, match=r"temperature must be at least 1e-30, got 1e-31"):
            call(z, ids, temperature=1e-31)
    assert bool(vk.token_stats(z.double(), ids, temperature=1e-31).logp.isfinite().all())


@pytest.mark.parametrize("softcap", (1.0, 30.0))
def test_softcap_over_temperature_has_a_limit(implementation: str, softcap: float) -> None:
    """Up to it, log p lacks no more than tanh's rounding times it; above, an error that names the way out."""
    z, ids = greedy_rows(softcap / 3, torch.float32, 1000)
    g, h = torch.rand(8) + 0.1, torch.rand(8) + 0.1
    for ratio, bound in ((100.0, 2e-6), (500.0, 1e-5)):
        settings = {"temperature": softcap / ratio * (1 + 1e-6), "softcap": softcap}
        assert_statistics(vk.token_stats(z, ids, **settings), exact(z, ids, g, h, **settings)[0], bound)
    with pytest.raises(ValueError, match=r"softcap / temperature must be at most 500, got .*logits in float64"):
        vk.token_stats(z, ids, temperature=softcap / 501, softcap=softcap)
    with vk.use_backend("reference"):
        vk.token_stats(z.double(), ids, temperature=softcap / 501, softcap=softcap)


@pytest.mark.parametrize("inplace", (False, True))
def test_known_coefficients(implementation: str, inplace: bool) -> None:
    """weighted_logp takes its gradient in the forward, from the same sums."""
    for temperature, (z, ids) in (
        (1e-5, greedy_rows(3.0, torch.float32, 1000)),
        (0.6, one_choice(-1e9, torch.float32, 10)),
    ):
        c = torch.rand(len(ids)) + 0.1
        want, want_grad = exact(z, ids, c, torch.zeros_like(c), temperature)
        y = z.clone().requires_grad_()
        x = y * 1.0 if inplace else y
        total, _ = vk.weighted_logp(x, ids, c, temperature=temperature, inplace=inplace)
        total.backward()
        torch.testing.assert_close(total.detach().double(), (c * want.logp).sum(), rtol=2e-6, atol=2e-6)
        assert y.grad is not None
        torch.testing.assert_close(y.grad.double() * temperature, want_grad * temperature, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_a_block_far_above_those_before(implementation: str, dtype: torch.dtype) -> None:
    """88 above in nats, 2^t leaves fp32's exponents, and 177 or 355 above they come round again: nothing would show it."""
    for rise in (80.0, 100.0, 177.5, 200.0, 355.0, 400.0, 5000.0):
        z = torch.randn(4, 5000)
        z[:, 4500:] += rise
        z[1, 4600:] -= rise
        z = z.to(dtype)
        ids = torch.tensor([3, 4550, 4999, 4700])
        g, h = torch.rand(4) + 0.1, torch.rand(4) + 0.1
        want, want_grad = exact(z, ids, g, h, 1.0)
        stats, grad = run(z, ids, g, h)
        assert_statistics(stats, want)
        assert_gradient(grad, want_grad, g + h * (1 + want.entropy), want)
