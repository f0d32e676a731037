"""VCPO's two controls with any objective: OPOB in the advantages, ESS in the learning rate."""

from __future__ import annotations

import pytest
import torch

import vcpo_kernels as vk
from tests.objectives import ragged
from vcpo_kernels import objectives
from vcpo_kernels.objectives import OBJECTIVES

GROUPS = torch.tensor([0, 0, 1, 1, 0, 1])
REWARDS = torch.tensor([1.0, 0.0, 5.0, 0.25, 1.0, -1.0], dtype=torch.float64)


def opob(batch: ragged.Batch, stats: vk.TokenStats) -> torch.Tensor:
    log_weights = vk.sequence_log_weights(stats.logp.detach(), batch.mu, batch.segments)
    norms = batch.segments.sum(stats.score_sqnorm)
    valid = batch.segments.lengths > 0
    return objectives.opob_advantages(REWARDS, GROUPS, log_weights, norms, num_groups=2, valid=valid)


@pytest.mark.parametrize("max_weight", [8.0, 1.2, None])
def test_both_with_truncated_sequence_weights_is_vcpo_loss(max_weight: float | None) -> None:
    """The package's own loss, by way of the objectives: advantages, coefficients, ESS and gradient."""
    batch = ragged.make("indexed")
    stats = batch.stats()
    want = vk.vcpo_loss(
        stats, batch.mu, REWARDS, GROUPS, batch.segments, vk.VCPOConfig(max_weight=max_weight), num_groups=2
    )
    advantages = opob(batch, stats)
    out = objectives.sequence_truncated_is(stats, batch.mu, advantages, batch.segments, max_weight=max_weight)
    torch.testing.assert_close(advantages, want.advantages)
    torch.testing.assert_close(out.coefficients, batch.segments.spread(want.coefficients))
    torch.testing.assert_close(out.ess_moments, want.ess_moments)
    torch.testing.assert_close(out.ess_ratio, want.ess_ratio)
    (a,) = torch.autograd.grad(out.loss, batch.logits, retain_graph=True)
    (b,) = torch.autograd.grad(want.loss, batch.logits)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["gspo", "dapo", "cispo", "icepop"])
def test_both_controls_in_a_step(name: str) -> None:
    """The update is lr sqrt(ESS/B) times the gradient with OPOB advantages, over two micro-batches."""
    batches = [ragged.make("packed", seed=s) for s in (1, 2)]
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    rate = vk.EssLearningRate(optimizer)
    outs = []
    for batch in batches:
        stats = vk.token_stats(weight * batch.logits.detach(), batch.token_ids)
        outs.append(OBJECTIVES[name](stats, batch.mu, opob(batch, stats), batch.segments))
        rate.observe(outs[-1])
        outs[-1].loss.backward()
    gradient = weight.grad.clone()
    optimizer.step()
    log_weights = torch.cat(
        [out.log_weights[batch.segments.lengths > 0] for out, batch in zip(outs, batches, strict=True)]
    )
    ratio = vk.effective_sample_size(log_weights).ratio
    torch.testing.assert_close(rate.ratio, ratio.double())
    torch.testing.assert_close(weight.detach(), 1 - 0.5 * ratio.sqrt() * gradient)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert gradient != 0


def test_zero_grad_forgets_what_was_backpropagated() -> None:
    """An ObjectiveOutput is watched as a VCPOOutput is: a skipped step leaves nothing to the next."""
    batch = ragged.make()
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    out = objectives.gspo(
        vk.token_stats(weight * batch.logits.detach(), batch.token_ids), batch.mu, batch.advantages, batch.segments
    )
    rate.observe(out)
    out.loss.backward()
    optimizer.zero_grad()
    fresh = objectives.reinforce(
        vk.token_stats(weight * batch.logits.detach(), batch.token_ids),
        vk.token_stats(batch.logits.detach(), batch.token_ids).logp,
        batch.advantages,
        batch.segments,
    )
    rate.observe(fresh)
    fresh.loss.backward()
    optimizer.step()
    torch.testing.assert_close(rate.ratio, torch.ones((), dtype=torch.float64))


def test_ess_max_weight_truncates_ess_alone() -> None:
    batch = ragged.make(spread=3.0)
    a, b = (
        objectives.gspo(batch.stats(), batch.mu, batch.advantages, batch.segments, ess_max_weight=limit)
        for limit in (None, 1.0)
    )
    live = batch.segments.lengths > 0
    want = vk.effective_sample_size(b.log_weights[live].clamp(max=0.0))
    torch.testing.assert_close(b.ess_ratio, want.ratio)
    assert b.ess_ratio > a.ess_ratio
    assert torch.equal(a.coefficients, b.coefficients)
