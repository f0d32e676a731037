"""OPOBAccumulator: the paper's procedure, against SequenceGradients, the written-out formula and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import vcpo_kernels as vk
from tests.sequence_gradients.models import VOCABULARY, Oracle, assert_gradients, oracle, token_model

GROUPS, SAMPLES, LENGTH = 2, 3, 6
BATCH = GROUPS * SAMPLES


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, mask, behaviour logp (a little off the policy's), rewards."""
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([6, 5, 3, 6, 4, 6])[:, None]
    logp = vk.token_stats(token_model()(ids), ids, mask, shift=True).logp.detach()
    return ids, mask, logp + 0.3 * torch.randn(BATCH, LENGTH), torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0])


def accumulate(
    opob: vk.OPOBAccumulator, model: nn.Module, ids: Tensor, mask: Tensor, mu: Tensor, rewards: Tensor
) -> list[Tensor]:
    found = []
    for g in range(GROUPS):
        of_group = range(g * SAMPLES, (g + 1) * SAMPLES)
        opob.start_group(rewards[of_group.start : of_group.stop])
        for i in of_group:
            one = slice(i, i + 1)
            stats = vk.token_stats(model(ids[one]), ids[one], mask[one], shift=True)
            opob.backward(stats, mu[one], vk.Segments.padded(mask[one]))
        found.append(opob.finish_group())
    return found


@pytest.mark.parametrize("weighting", ("paper", "estimator", "official", "mean", "length"))
@pytest.mark.parametrize("aggregation", ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"))
def test_equals_sequence_gradients(aggregation: str, weighting: str) -> None:
    """Both procedures, on top of a gradient that is there already."""
    model, (ids, mask, mu, rewards) = token_model(), batch()
    seg = vk.Segments.padded(mask)
    settings = {"aggregation": aggregation, "baseline_weighting": weighting, "max_weight": 1.2, "max_tokens": LENGTH}
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.125)
    with vk.SequenceGradients(model) as grads:
        stats = vk.token_stats(model(ids), ids, mask, shift=True)
        grads.backward(seg.sum(stats.logp), seg)
        config = vk.VCPOConfig(score_norm=grads.squared_norms(), **settings)
        want = vk.vcpo_loss(stats, mu, rewards, SAMPLES, seg, config)
        grads.accumulate_(want.coefficients)
    gradients = {n: p.grad.double() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.125)
    config = vk.VCPOConfig(num_sequences=BATCH, num_tokens=float(seg.lengths.sum() - BATCH), **settings)
    opob = vk.OPOBAccumulator(model.parameters(), config)
    baselines = accumulate(opob, model, ids, mask, mu, rewards)
    assert_gradients(model, gradients)
    torch.testing.assert_close(torch.stack(baselines), want.baselines)
    out = opob.output()
    for field in ("log_weights", "advantages", "coefficients", "baselines", "ess_ratio", "ess_moments"):
        torch.testing.assert_close(getattr(out, field), getattr(want, field), rtol=2e-5, atol=1e-6)
    assert out.metrics.keys() == want.metrics.keys()


def test_is_the_papers_algebra_to_the_bit() -> None:
    """sum_i u_i (R_i - R) grad_i - (b - R) sum_i u_i grad_i, with u_i = -k_i w^_i / sigma and R the group's mean reward, by
    plain autograd in the same order.
    """
    model, (ids, mask, mu, rewards) = token_model(), batch()
    opob = vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(num_sequences=BATCH))
    baselines = accumulate(opob, model, ids, mask, mu, rewards)
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for g in range(GROUPS):
        of_group = range(g * SAMPLES, (g + 1) * SAMPLES)
        r = rewards[of_group.start : of_group.stop].double()
        center, std = float(r.mean()), float(r.std(correction=0))
        unweighted = [torch.zeros_like(p) for p in parameters]
        for i in of_group:
            one = slice(i, i + 1)
            seg = vk.Segments.padded(mask[one])
            stats = vk.token_stats(model(ids[one]), ids[one], mask[one], shift=True)
            log_weight = vk.sequence_log_weights(stats, mu[one], seg)
            length = float(mask[i].sum()) - 1
            k = float(1 / (torch.tensor(float(BATCH), dtype=torch.float64) * length))
            u = -(k * math.exp(min(float(log_weight), math.log(8.0)))) / std
            for s, t, grad in zip(total, unweighted, torch.autograd.grad(log_weight.sum(), parameters), strict=True):
                s += grad * (u * (float(r[i - of_group.start]) - center))
                t.add_(grad, alpha=u)
        for s, t in zip(total, unweighted, strict=True):
            s.sub_(t * (float(baselines[g]) - center))
    assert all(torch.equal(p.grad, s) for p, s in zip(parameters, total, strict=True))


def estimator_variance(exact: Oracle, scale: Tensor, rewards: Tensor, baseline: Tensor) -> float:
    """sum_i (k_i w^_i)^2 ||grad_i||^2 (R_i - b)^2 of one group."""
    return float((scale.square() * exact.norms * (rewards - baseline).square()).sum())


def test_the_baseline_is_optimal_by_brute_force() -> None:
    """For a fixed batch, with "estimator", no other number and no other baseline of the package has a smaller variance."""
    model, (ids, mask, mu, rewards) = token_model(), batch()
    rewards = torch.randn(BATCH)
    seg = vk.Segments.padded(mask)
    exact = oracle(model, lambda m: seg.sum(vk.token_stats(m(ids), ids, mask, shift=True).logp), BATCH)
    stats = vk.token_stats(model(ids), ids, mask, shift=True)

    def baselines_of(weighting: str) -> Tensor:
        config = vk.VCPOConfig(score_norm=exact.norms.float(), baseline_weighting=weighting, normalize_std=False)
        return vk.vcpo_loss(stats, mu, rewards, SAMPLES, seg, config).baselines

    log_weights = vk.sequence_log_weights(stats, mu, seg).detach().double()
    scale = log_weights.clamp(max=math.log(8.0)).exp() / (BATCH * (seg.lengths.double() - 1))
    others = {w: baselines_of(w) for w in ("paper", "official", "mean", "length")}
    best = baselines_of("estimator")
    for g in range(GROUPS):
        of_group = slice(g * SAMPLES, (g + 1) * SAMPLES)
        part = Oracle(exact.norms[of_group], {})
        least = estimator_variance(part, scale[of_group], rewards[of_group], best[g])
        grid = [estimator_variance(part, scale[of_group], rewards[of_group], b) for b in torch.linspace(-3, 3, 2001)]
        assert least <= min(grid) * (1 + 1e-6)
        for name, value in others.items():
            assert least < estimator_variance(part, scale[of_group], rewards[of_group], value[g]), name
        assert least < estimator_variance(part, scale[of_group], rewards[of_group], torch.tensor(0.0))


def test_a_group_of_equal_rewards_costs_no_backward() -> None:
    model, (ids, mask, mu, _) = token_model(), batch()
    opob = vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(num_sequences=BATCH))
    with torch.no_grad():  # so that any backward would fail
        baselines = accumulate(opob, model, ids, mask, mu, torch.full((BATCH,), 0.7))
    torch.testing.assert_close(torch.stack(baselines), torch.full((GROUPS,), 0.7))
    assert all(p.grad is None for p in model.parameters())
    assert bool((opob.output().advantages == 0).all())


def test_a_broken_sequence_is_left_out() -> None:
    """NaN from the sampler in one sequence: the others' update is what it is without it, ESS still counts it."""
    model, (ids, mask, mu, rewards) = token_model(), batch()
    mu[1, 2] = float("nan")
    config = vk.VCPOConfig(num_sequences=BATCH, normalize_std=False)
    opob = vk.OPOBAccumulator(model.parameters(), config)
    accumulate(opob, model, ids, mask, mu, rewards)
    out = opob.output()
    assert int(out.metrics["nonfinite_sequences"]) == 1
    assert float(out.coefficients[1]) == 0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    seg = vk.Segments.padded(mask)
    want = oracle(model, lambda m: seg.sum(vk.token_stats(m(ids), ids, mask, shift=True).logp), BATCH)
    assert_gradients(model, want.weighted(-out.coefficients))


def test_output_feeds_the_ess_step() -> None:
    model, (ids, mask, mu, rewards) = token_model(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    opob = vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(num_sequences=BATCH))
    accumulate(opob, model, ids, mask, mu, rewards)
    rate.observe(opob.output())
    optimizer.step()
    with pytest.raises(RuntimeError, match="no group was finished"):
        opob.output()  # it began anew


def test_arguments_and_order() -> None:
    model, (ids, mask, mu, _) = token_model(), batch()
    config = vk.VCPOConfig(num_sequences=4)
    with pytest.raises(TypeError, match=r"(?s)params must be a torch.Tensor.*model.parameters\(\)"):
        vk.OPOBAccumulator(model.named_parameters(), config)
    with pytest.raises(ValueError, match=r"params must hold parameters that require a gradient"):
        vk.OPOBAccumulator([torch.zeros(2)], config)
    with pytest.raises(ValueError, match=r"aggregation 'seq-mean-token-mean' needs config.num_sequences"):
        vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig())
    with pytest.raises(ValueError, match=r"needs config.num_tokens"):
        vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(aggregation="token-mean"))
    with pytest.raises(ValueError, match=r"needs config.max_tokens"):
        vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(aggregation="seq-mean-token-sum-norm", num_sequences=4))
    with pytest.raises(ValueError, match=r"score_norm must stay 'logit'"):
        vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(num_sequences=4, score_norm=torch.ones(4)))
    opob = vk.OPOBAccumulator(model.parameters(), config)
    one = vk.Segments.padded(mask[:1])
    stats = vk.token_stats(model(ids[:1]), ids[:1], mask[:1], shift=True)
    with pytest.raises(RuntimeError, match=r"no group is started"):
        opob.backward(stats, mu[:1], one)
    with pytest.raises(ValueError, match=r"rewards must be finite"):
        opob.start_group(torch.tensor([1.0, float("nan")]))
    opob.start_group(torch.tensor([1.0, 0.0]))
    with pytest.raises(RuntimeError, match=r"group before is not finished"):
        opob.start_group(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"segments must hold one sequence, got 6"):
        opob.backward(stats, mu, vk.Segments.padded(mask))
    with pytest.raises(RuntimeError, match=r"0 of the group's 2 sequences are in"):
        opob.finish_group()
    with torch.no_grad():
        detached = vk.token_stats(model(ids[:1]), ids[:1], mask[:1], shift=True)
    with pytest.raises(ValueError, match=r"stats carry no gradient"):
        opob.backward(detached, mu[:1], one)
