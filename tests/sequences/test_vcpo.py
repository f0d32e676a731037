"""vcpo_loss from the user's side: gradients to the logits, shifted statistics, gradient accumulation, torch.compile.

The arithmetic of the coefficients has its own tests (test_vcpo_coefficients.py); here they are taken as given where that
helps. Broken batches are in test_vcpo_degenerate.py, errors in test_vcpo_errors.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.sequences import brute_force
from tests.sequences.brute_force import LAYOUTS, lay_out
from tests.sequences.vcpo_batches import GROUPS, LENGTHS, NAN, REWARDS, VOCABULARY, make, written_out_gradient
from vcpo_kernels.sequences.aggregation import AGGREGATIONS
from vcpo_kernels.sequences.baselines import WEIGHTINGS
from vcpo_kernels.sequences.ess import ess_from_moments, merge_moments
from vcpo_kernels.sequences.vcpo_coefficients import METRICS

# --- value and gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_everything_matches_brute_force(kind: str, aggregation: str) -> None:
    """Loss, gradient with respect to the logits, advantages, baselines and metrics, for each switch, in
    float64.
    """
    batch = make(kind)
    logp = torch.log_softmax(batch.logits.detach(), -1).gather(-1, batch.token_ids[..., None])[..., 0]
    p = torch.softmax(batch.logits.detach(), -1)
    one_hot = torch.nn.functional.one_hot(batch.token_ids, VOCABULARY)
    score = (one_hot - p).square().sum(-1)
    pick = batch.layout.pick
    log_weights = [math.fsum((a - b).tolist()) for a, b in zip(pick(logp), pick(batch.behavior_logp), strict=True)]
    ratios = [(a - b).tolist() for a, b in zip(pick(logp), pick(batch.behavior_logp), strict=True)]
    norms = [math.fsum(s.tolist()) for s in pick(score)]
    for weighting, normalize_std, max_weight in itertools.product(WEIGHTINGS, (True, False), (8.0, 1.1, None)):
        switches = {
            "aggregation": aggregation,
            "baseline_weighting": weighting,
            "normalize_std": normalize_std,
            "max_weight": max_weight,
        }
        out = batch.loss(**switches, max_tokens=6)
        expected = brute_force.vcpo(
            log_weights, LENGTHS, REWARDS, GROUPS.tolist(), norms, 2, max_tokens=6, log_ratios=ratios, **switches
        )
        assert out.coefficients.tolist() == pytest.approx(expected.coefficients, rel=1e-11)
        assert out.advantages.tolist() == pytest.approx(expected.advantages, rel=1e-11)
        assert out.baselines.tolist() == pytest.approx(expected.baselines, rel=1e-11)
        assert out.log_weights.tolist() == pytest.approx(log_weights)
        assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(expected.metrics, rel=1e-11)
        assert (out.ess.item(), out.ess_ratio.item()) == pytest.approx(
            brute_force.ess_ratio([w for w, n in zip(log_weights, LENGTHS, strict=True) if n])
        )
        assert out.loss.item() == pytest.approx(expected.loss, rel=1e-11)
        torch.testing.assert_close(batch.gradient(out), written_out_gradient(batch, out), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["padded", "packed", "indexed"])
def test_gradient_is_the_formula_even_when_everything_depends_on_theta(kind: str) -> None:
    """Weights, baselines and coefficients are constants: the gradient is linear in them, with no term through
    w or b.

    Checked without the package's coefficients: L_i, n_i and c_i are rebuilt here, detached, from the same
    logits.
    """
    batch = make(kind)
    out = batch.loss(normalize_std=False, aggregation="seq-mean-token-sum")
    logp = torch.log_softmax(batch.logits, -1).gather(-1, batch.token_ids[..., None])[..., 0]
    loss = logp.sum() * 0
    for i, (theta, mu) in enumerate(zip(batch.layout.pick(logp), batch.layout.pick(batch.behavior_logp), strict=True)):
        w = (theta - mu).sum().exp().clamp(max=8.0).detach()
        loss = loss - w * (REWARDS[i] - out.baselines[GROUPS[i]]) * theta.sum() / 5  # B = 5: one is empty
    torch.testing.assert_close(batch.gradient(out), torch.autograd.grad(loss, batch.logits)[0])


@pytest.mark.parametrize("factor", [3.0, 1 / 7, -1.0, 0.0])
def test_upstream_gradient_is_used(factor: float) -> None:
    """Liger#968: a loss that ignores what it is multiplied by breaks accumulation and loss scaling."""
    batch = make("padded")
    once = batch.gradient(batch.loss())
    (scaled,) = torch.autograd.grad(batch.loss().loss * factor, batch.logits)
    torch.testing.assert_close(scaled, once * factor)


def test_loss_beside_other_terms_and_twice() -> None:
    """An entropy bonus shares the pass; retain_graph allows a second backward with the same result."""
    batch = make("packed")
    stats = batch.stats()
    out = vk.vcpo_loss(stats, batch.behavior_logp, torch.tensor(REWARDS), GROUPS, batch.layout.segments)
    entropy = batch.layout.segments.mean(stats.entropy).sum()
    together = torch.autograd.grad(out.loss - 0.1 * entropy, batch.logits, retain_graph=True)[0]
    first = torch.autograd.grad(out.loss, batch.logits, retain_graph=True)[0]
    second = torch.autograd.grad(entropy, batch.logits)[0]
    torch.testing.assert_close(together, first - 0.1 * second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_logits(dtype: torch.dtype) -> None:
    """fp32 arithmetic on fp32 or bf16 logits against float64 on the same values."""
    low, high = make("padded", dtype=dtype), make("padded")
    high.logits, high.behavior_logp = (
        low.logits.detach().double().requires_grad_(),
        low.behavior_logp.double(),
    )
    got, want = low.loss(), high.loss()
    assert got.loss.dtype == got.coefficients.dtype == torch.float32
    torch.testing.assert_close(got.coefficients.double(), want.coefficients, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(low.gradient(got).double(), high.gradient(want), **tolerance)


def test_only_the_loss_is_differentiable() -> None:
    out = make("padded").loss()
    assert out.loss.requires_grad
    tensors = [getattr(out, f.name) for f in dataclasses.fields(out) if f.name not in ("loss", "metrics")]
    assert not any(t.requires_grad for t in [*tensors, *out.metrics.values()])
    assert tuple(out.metrics) == METRICS
    assert all(m.dim() == 0 for m in out.metrics.values())


def test_behavior_logp_that_requires_grad_gets_none() -> None:
    """On the first epoch mu is often the same model's logp, graph and all."""
    batch = make("padded")
    stats = batch.stats()
    mu = torch.zeros_like(stats.logp, requires_grad=True)
    out = vk.vcpo_loss(stats, mu, torch.tensor(REWARDS), GROUPS, batch.layout.segments)
    assert torch.autograd.grad(out.loss, [batch.logits, mu], allow_unused=True)[1] is None
    stats = batch.stats()
    own = vk.vcpo_loss(stats, stats.logp, torch.tensor(REWARDS), GROUPS, batch.layout.segments)
    assert own.log_weights.tolist() == [0.0] * 6
    torch.testing.assert_close(batch.gradient(own), written_out_gradient(batch, own))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_behavior_logp_and_rewards_in_other_dtypes(dtype: torch.dtype) -> None:
    """What samplers and reward functions hand over: half-precision logp; int, bool or double rewards."""
    batch = make("padded", dtype=torch.float32)
    reference = make("padded", dtype=torch.float32)
    reference.behavior_logp = batch.behavior_logp.to(dtype).float()
    batch.behavior_logp = batch.behavior_logp.to(dtype)
    rewards = torch.tensor([1, 0, 5, 0, 1, -1])
    want = reference.loss(rewards.float(), GROUPS)
    for given in (rewards, rewards.int(), rewards.double(), rewards.bfloat16()):
        assert torch.equal(batch.loss(given, GROUPS).coefficients, want.coefficients)
    boolean = batch.loss(rewards > 0, GROUPS)
    assert torch.equal(boolean.coefficients, reference.loss((rewards > 0).float(), GROUPS).coefficients)


def test_a_measured_score_norm_replaces_the_logit_norm() -> None:
    batch = make("indexed")
    norms = batch.layout.segments.sum(batch.stats().score_sqnorm)
    logit = batch.loss()
    assert torch.equal(batch.loss(score_norm=norms).coefficients, logit.coefficients)
    single = batch.loss(score_norm=norms.float().requires_grad_())  # measured in fp32, graph and all
    torch.testing.assert_close(single.coefficients, logit.coefficients, rtol=1e-6, atol=1e-7)
    other = batch.loss(score_norm=norms * torch.arange(1.0, 7.0))
    assert not torch.allclose(other.baselines, logit.baselines)


# --- shift --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["padded", "packed", "packed_mask", "indexed"])
def test_shifted_statistics_with_entry_0_inside_the_mask(kind: str) -> None:
    """shift=True and a mask of all tokens is what a naive caller passes: a first token has no prediction of
    its own.

    It must be in no log-weight, in no length, and without a gradient. In packed rows the first token of every
    sequence was "predicted" by its neighbour's last; before this test existed it got that neighbour a
    gradient.
    """
    lengths = [4, 1, 3]  # the second has no predicted token at all
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    n = sum(lengths)
    rewards = torch.tensor([1.0, NAN, 0.0], dtype=torch.float64)
    if kind == "padded":
        shape: tuple[int, ...] = (3, 4)
        seg = vk.Segments.padded(torch.arange(4) < torch.tensor(lengths)[:, None])
        predicted = [[1, 2, 3], [], [9, 10]]
    else:
        shape = (1, n)
        ends = torch.tensor([0, 4, 5, 8])
        predicted = [[1, 2, 3], [], [6, 7]]
        if kind == "indexed":  # one row: only its entry 0 is known to be unpredicted; the caller masks the others
            ids, mask = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2]]), torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1]])
            seg = vk.Segments.indexed(ids, 3, mask)
        else:
            seg = vk.Segments.packed(ends, torch.ones(1, n) if kind == "packed_mask" else None)
    logits = torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64, requires_grad=True)
    token_ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    mu = torch.randn(shape, generator=generator, dtype=torch.float64)
    out = vk.vcpo_loss(vk.token_stats(logits, token_ids, shift=True), mu, rewards, 3, seg)

    flat = logits.reshape(-1, VOCABULARY)
    logp = torch.log_softmax(flat, -1)
    totals = [sum(logp[t - 1, token_ids.view(-1)[t]] for t in sequence) for sequence in predicted]
    log_w = [x.item() - mu.view(-1)[s].sum().item() if s else 0.0 for x, s in zip(totals, predicted, strict=True)]
    assert out.log_weights.tolist() == pytest.approx(log_w)
    assert out.metrics["num_tokens"] == 5
    assert out.metrics["num_sequences"] == 2
    assert out.loss.item() == pytest.approx(
        -sum(c * len(s) for c, s in zip(out.coefficients.tolist(), predicted, strict=True))
    )
    written_out = -sum(c * x for c, x in zip(out.coefficients, totals, strict=True))
    expected = torch.autograd.grad(written_out, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], expected)


# --- gradient accumulation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_of_whole_groups_sum_to_the_batch(aggregation: str) -> None:
    """With the step's counts given, the sum of the micro-batches' losses and gradients is the full batch's:
    no / accum.
    """
    lengths = [3, 1, 2, 4, 0, 2, 5, 1]
    full = make("padded", lengths)
    rewards = torch.tensor([1.0, 0, 0.5, 0.25, 9, 1, 0, 1])
    counts = {"num_sequences": 7, "num_tokens": sum(lengths), "max_tokens": 5, "aggregation": aggregation}
    whole = full.loss(rewards, 2, aggregation=aggregation, max_tokens=5)
    total, losses, observed = torch.zeros_like(full.logits), 0.0, []
    for rows in (slice(0, 2), slice(2, 6), slice(6, 8)):
        stats = vk.token_stats(full.logits[rows], full.token_ids[rows])
        seg = vk.Segments.padded(full.layout.segments.mask.view(full.layout.shape)[rows])
        out = vk.vcpo_loss(stats, full.behavior_logp[rows], rewards[rows], 2, seg, vk.VCPOConfig(**counts))
        total += torch.autograd.grad(out.loss, full.logits)[0]
        losses += out.loss.item()
        observed.append(out.ess_moments)
    torch.testing.assert_close(total, full.gradient(whole))
    assert losses == pytest.approx(whole.loss.item())
    merged = ess_from_moments(merge_moments(torch.stack(observed)))
    torch.testing.assert_close(torch.stack(merged), torch.stack([whole.ess, whole.ess_ratio]))


# --- torch.library and torch.compile ------------------------------------------------------------------------


@pytest.mark.cpu_only("schemas and fakes are the same on every device")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_opcheck_policy_loss(kind: str) -> None:
    layout = lay_out(kind, LENGTHS)
    seg = layout.segments
    logp = torch.randn(math.prod(layout.shape), dtype=torch.float64, requires_grad=True)
    coefficients, lengths = torch.randn(6, dtype=torch.float64), torch.tensor(LENGTHS).double()
    torch.library.opcheck(
        torch.ops.vcpo_kernels.policy_loss.default,
        (logp, coefficients, lengths, seg.mask, seg.offsets, seg.order),
    )


def check_compiled_equals_eager(backend: str, kind: str, shift: bool, dynamic: bool | None = None) -> None:
    # Two lengths: the second call may recompile once, and must be right too.
    def step(logits: Tensor, token_ids: Tensor, mu: Tensor, rewards: Tensor, seg: Any, groups: Any) -> Any:
        segments = vk.Segments.padded(seg) if kind == "padded" else seg
        stats = vk.token_stats(logits, token_ids, temperature=0.7, shift=shift)
        out = vk.vcpo_loss(stats, mu, rewards, groups, segments, vk.VCPOConfig(max_tokens=9), 3)
        return out.loss, out.coefficients, out.ess_ratio, out.metrics["ess"], out.ess_moments

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    for lengths in ([3, 1, 2, 2], [5, 2, 2, 4]):
        batch = make(kind, lengths, dtype=torch.float32)
        batch.behavior_logp.nan_to_num_(0.0)
        segments = batch.layout.segments
        seg = segments.mask.view(batch.layout.shape) if kind == "padded" and segments.mask is not None else segments
        rewards, groups = torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([0, 0, 2, 2])
        results = []
        for function in (step, compiled):
            logits = batch.logits.detach().clone().requires_grad_()
            loss, *rest = function(logits, batch.token_ids, batch.behavior_logp, rewards, seg, groups)
            loss.backward()
            results.append([loss.detach(), *rest, logits.grad])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.cpu_only("graphs are the same on every device")
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_compiled_without_graph_breaks_equals_eager(kind: str, shift: bool) -> None:
    """token_stats -> vcpo_loss -> backward under torch.compile(fullgraph=True)."""
    check_compiled_equals_eager("aot_eager", kind, shift)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor_equals_eager(dynamic: bool | None) -> None:
    check_compiled_equals_eager("inductor", "padded", True, dynamic)
