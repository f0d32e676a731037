"""Running token_stats, its float64 oracle, and the bounds between them."""

from __future__ import annotations

import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels.core import registry
from vcpo_kernels.rows.statistics import RowStatistics

BOUND = registry.BACKENDS["native"].relative_error  # the reference's is the same
FIELDS = RowStatistics._fields
OUTPUT_EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def oracle(logits: Tensor, ids: Tensor, g: Tensor, h: Tensor, **options: object) -> tuple[vk.TokenStats, Tensor]:
    """Statistics and gradient of g . logp + h . entropy in float64, by the reference backend."""
    z = logits.double().requires_grad_()
    with vk.use_backend("reference"):
        stats = vk.token_stats(z, ids, **options)
        (torch.dot(stats.logp.flatten(), g.double()) + torch.dot(stats.entropy.flatten(), h.double())).backward()
    assert z.grad is not None
    return stats, z.grad


def assert_statistics(got: vk.TokenStats, want: vk.TokenStats, bound: float = BOUND) -> None:
    """Relative error <= bound (1 + |value|) for all; score_sqnorm also <= 1e-3 of itself."""
    for field in FIELDS:
        a, b = getattr(got, field), getattr(want, field)
        assert a.dtype == torch.float32
        error = (a.double() - b).abs() / (1 + b.abs())
        assert bool((error <= bound).all()), f"{field}: {error.max():.2e} at {int(error.argmax())}"
    error = (got.score_sqnorm.double() - want.score_sqnorm).abs()
    assert bool((error <= 1e-3 * want.score_sqnorm + 1e-30).all()), f"score_sqnorm: relative {error.max():.2e}"


def assert_gradient(got: Tensor, want: Tensor, scale: Tensor, stats: vk.TokenStats) -> None:
    """Within one rounding of the output dtype, plus what the statistics' own rounding to fp32 must carry over.

    scale [rows]: the size of the row's coefficients. p comes from the saved lse or logp, whichever is the smaller, so that
    half an ulp of that is a relative error of p.
    """
    assert got.shape == want.shape
    error = (got.double() - want).abs()
    saved = torch.minimum(stats.lse.abs(), stats.logp.abs()).double() * 2.0**-24
    bound = OUTPUT_EPS[got.dtype] * want.abs() + ((2e-6 + saved) * scale).unsqueeze(-1)
    if got.dtype == torch.float16:
        bound = bound + 2.0**-25  # half the spacing of its subnormals
    worst = (error / bound).max() if error.numel() else 0
    assert bool((error <= bound).all()), f"gradient: {worst:.2f} times the bound"


def run(logits: Tensor, ids: Tensor, g: Tensor, h: Tensor | None, **options: object) -> tuple[vk.TokenStats, Tensor]:
    z = logits.detach().requires_grad_()
    stats = vk.token_stats(z, ids, **options)
    loss = torch.dot(stats.logp.flatten(), g)
    if h is not None:
        loss = loss + torch.dot(stats.entropy.flatten(), h)
    (grad,) = torch.autograd.grad(loss, z)
    return stats, grad
