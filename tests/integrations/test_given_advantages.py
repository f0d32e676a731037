"""VCPO's weights on advantages that a trainer computed: the same gradient, value and ESS as vcpo_loss, whatever is masked."""

from __future__ import annotations

import math

import pytest
import torch

import vcpo_kernels as vk
from tests.integrations.trainer_batches import batch, token_advantages, vcpo
from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations._given_advantages import weighted_advantages

SUM = vk.VCPOConfig(aggregation="token-mean", num_tokens=1.0)  # k = 1


@pytest.mark.parametrize("max_weight", [8.0, 0.3, None])
def test_same_as_vcpo_loss(max_weight: float | None) -> None:
    """Gradient, value, log-weights, ESS and counts, with NaN in all padding."""
    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig(aggregation="token-mean", num_tokens=1.0, max_weight=max_weight))
    logp = torch.where(b.mask, b.logp(), float("nan"))
    result = weighted_advantages(Check("test"), logp, b.mu, token_advantages(b, out), b.segments, max_weight)
    loss = result.surrogate(logp).sum()
    assert result.metrics["truncated_fraction"] == out.metrics["truncated_fraction"]
    assert max_weight is None or result.metrics["truncated_fraction"] > 0
    torch.testing.assert_close(torch.autograd.grad(loss, b.logits)[0], gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.detach(), out.loss.detach())
    torch.testing.assert_close(result.log_weights, out.log_weights)
    torch.testing.assert_close(result.ess_moments, out.ess_moments)
    for name, value in result.metrics.items():
        torch.testing.assert_close(value, out.metrics[name], msg=name)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_broken_sequence_is_dropped_and_counted(broken: float) -> None:
    """mu of NaN or -inf (L = +inf): no gradient to it, none of its NaN to others; the step shrinks."""
    b = batch()
    out, _ = vcpo(b, SUM)
    advantages = token_advantages(b, out)
    b.mu[1, 0] = broken
    result = weighted_advantages(Check("test"), b.logp(), b.mu, advantages, b.segments, 8.0)
    (gradient,) = torch.autograd.grad(result.surrogate(b.logp()).sum(), b.logits)
    assert gradient.isfinite().all()
    assert not gradient[1].any()
    assert result.metrics["nonfinite_sequences"] == 1
    counted, _ = vcpo(b, SUM)
    torch.testing.assert_close(result.ess_moments, counted.ess_moments)


def test_impossible_token_has_no_weight() -> None:
    """logp of -inf is a weight of 0, not 0 * inf."""
    b = batch()
    out, _ = vcpo(b, SUM)
    with torch.no_grad():
        b.logits[2, 0, b.ids[2, 0]] = -math.inf
    result = weighted_advantages(Check("test"), b.logp(), b.mu, token_advantages(b, out), b.segments, 8.0)
    surrogate = result.surrogate(b.logp())
    assert surrogate.isfinite().all()
    assert not surrogate[2].any()
    assert torch.autograd.grad(surrogate.sum(), b.logits)[0].isfinite().all()


def test_extra_log_weights_add() -> None:
    """A ratio taken elsewhere joins L_i; at a sequence without tokens it is not looked at."""
    b = batch()
    out, gradient = vcpo(b, SUM)
    extra = torch.randn(8, dtype=torch.float64)
    extra[-1] = math.nan
    mu = b.mu + torch.where(b.segments.lengths > 0, extra / b.segments.lengths, 0.0)[:, None]
    result = weighted_advantages(Check("test"), b.logp(), mu, token_advantages(b, out), b.segments, 8.0, extra)
    got = torch.autograd.grad(result.surrogate(b.logp()).sum(), b.logits)[0]
    torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-12)


def test_advantages_that_are_not_finite_are_refused() -> None:
    b = batch()
    advantages = torch.ones(8, 7)
    advantages[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"test: advantages must be finite .* got 1 sequences"):
        weighted_advantages(Check("test"), b.logp(), b.mu, advantages, b.segments, 8.0)
    with pytest.raises(ValueError, match=r"test: max_weight must be finite and > 0, got -1"):
        weighted_advantages(Check("test"), b.logp(), b.mu, torch.ones(8, 7), b.segments, -1)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_fp32_and_bf16(backend: str) -> None:
    """fp32 log-probabilities stay fp32 for the backends' sake, sums excepted; bf16 ones count as the fp32 that they are."""
    b = batch()
    out, gradient = vcpo(b, SUM)
    logp = b.logp().float()
    with vk.use_backend(backend):
        result = weighted_advantages(Check("test"), logp, b.mu.float(), token_advantages(b, out), b.segments, 8.0)
    got = torch.autograd.grad(result.surrogate(logp).sum(), b.logits)[0]
    torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)
    assert result.coefficients.dtype == result.log_weights.dtype == torch.float32
    half = b.logp().bfloat16()
    rounded = weighted_advantages(Check("test"), half, b.mu, token_advantages(b, out), b.segments, 8.0)
    exact = weighted_advantages(Check("test"), half.float(), b.mu, token_advantages(b, out), b.segments, 8.0)
    assert torch.equal(rounded.coefficients, exact.coefficients)
