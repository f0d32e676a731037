"""fp16 under a loss scale: gradients that are taken before the scale is known are as exact as those taken after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk

SCALE = 65536.0
TOKENS_IN_THE_MEAN = 1_000_000
N, H, V = 96, 32, 2500


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight (fp16), ids, and coefficients of both signs and of very different sizes."""
    c = torch.randn(N) * torch.logspace(-2, 0, N) / TOKENS_IN_THE_MEAN
    return torch.randn(N, H).half(), (torch.randn(V, H) * 0.1).half(), torch.randint(0, V, (N,)), c


def exact(hidden: Tensor, weight: Tensor, ids: Tensor, c: Tensor) -> list[Tensor]:
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax(h @ w.T, -1).gather(1, ids[:, None])[:, 0]
    return list(torch.autograd.grad((c.double() * logp).sum(), (h, w)))


def known(h: Tensor, w: Tensor, ids: Tensor, c: Tensor) -> Tensor:
    return vk.weighted_logp(h @ w.T, ids, c)[0]


WAYS: dict[str, Callable[..., Tensor]] = {
    "weighted_logp": known,
    "weighted_logp in place": lambda h, w, ids, c: vk.weighted_logp(h @ w.T, ids, c, inplace=True)[0],
    "weighted_logp shifted": lambda h, w, ids, c: vk.weighted_logp(
        (h @ w.T)[None], ids[None].roll(1), c[None].roll(1), shift=True
    )[0],
    "linear_weighted_logp": lambda h, w, ids, c: vk.linear_weighted_logp(h, w, ids, c)[0],
    "linear_weighted_logp, chunks": lambda h, w, ids, c: vk.linear_weighted_logp(h, w, ids, c, chunk_bytes=7 * V)[0],
    "linear_weighted_logp, bias": lambda h, w, ids, c: vk.linear_weighted_logp(h, w, ids, c, h.new_zeros(V))[0],
}


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [float((a.double() / SCALE - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("retain", (False, True))
def test_as_exact_as_two_passes_under_the_scale(way: str, retain: bool) -> None:
    """The mean over a million tokens: each coefficient is far below fp16's smallest number."""
    hidden, weight, ids, c = operands()
    if way == "weighted_logp shifted":
        c[-1] = 0  # its entry 0, which takes no part
    want = exact(hidden, weight, ids, c)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    stats = vk.token_stats(h @ w.T, ids)
    two_passes = errors(list(torch.autograd.grad((c * stats.logp).sum() * SCALE, (h, w))), want)
    loss = WAYS[way](h, w, ids, c) * SCALE
    got = errors(list(torch.autograd.grad(loss, (h, w), retain_graph=retain)), want)
    assert all(g <= 1.5 * t + 2e-4 for g, t in zip(got, two_passes, strict=True)), (got, two_passes)


def test_large_sums_stay_finite() -> None:
    """Rows that all push one weight the same way: a gradient that no later loss scale could bring back from inf."""
    n = 4000
    hidden, weight = (
        torch.full((n, 8), 30.0).half().requires_grad_(),
        (torch.randn(50, 8) * 0.01).half().requires_grad_(),
    )
    c = torch.full((n,), 1.0 / n)
    loss, _ = vk.linear_weighted_logp(hidden, weight, torch.zeros(n, dtype=torch.long), c)
    loss.backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
    want = exact(hidden.detach(), weight.detach(), torch.zeros(n, dtype=torch.long), c)[1]
    assert float((weight.grad.double() - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize("way", ("weighted_logp", "linear_weighted_logp"))
def test_a_broken_coefficient_shows_in_its_own_row_alone(way: str) -> None:
    """NaN, inf and coefficients outside the mask say nothing about the range of the others."""
    hidden, weight, ids, c = operands()
    c[3] = torch.nan
    mask = torch.arange(N) != 5
    c[5] = 1e30
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if way == "weighted_logp":
        loss, _ = vk.weighted_logp(h @ w.T, ids, c, mask)
    else:
        loss, _ = vk.linear_weighted_logp(h, w, ids, c, mask=mask)
    (grad,) = torch.autograd.grad(loss * SCALE, h)
    clean = torch.where((torch.arange(N) == 3) | ~mask, 0.0, c)
    want = exact(hidden, weight, ids, clean)[0]
    others = (torch.arange(N) != 3).nonzero()[:, 0]
    assert errors([grad[others]], [want[others]])[0] < 2e-3
    assert bool((grad[5] == 0).all())


def test_all_zero_coefficients_and_no_rows() -> None:
    hidden, weight, ids, c = operands()
    for rows in (N, 0):
        h = hidden[:rows].clone().requires_grad_()
        loss, _ = vk.linear_weighted_logp(h, weight, ids[:rows], 0 * c[:rows])
        (grad,) = torch.autograd.grad(loss * SCALE, h)
        assert bool((grad == 0).all())
        z = torch.zeros(rows, 7, dtype=torch.half, requires_grad=True)
        (grad,) = torch.autograd.grad(vk.weighted_logp(z, ids[:rows] % 7, 0 * c[:rows])[0] * SCALE, z)
        assert bool((grad == 0).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_other_dtypes_are_left_as_they_are(dtype: torch.dtype) -> None:
    """They have fp32's range: a factor of 1 still costs no pass, and bits do not change."""
    z, ids, c = torch.randn(5, 9).to(dtype), torch.randint(0, 9, (5,)), torch.randn(5)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    vk.weighted_logp(a, ids, c)[0].backward()
    vk.weighted_logp(b, ids, c * 2**20)[0].backward(torch.tensor(2.0**-20))
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
