"""vcpo_loss from the user's side: gradients to the logits, gradient accumulation, broken batches, and every
error by message.

The arithmetic of the coefficients has its own tests (test_vcpo_coefficients.py); here they are taken as given
where that helps.
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
from tests import brute_force
from tests.brute_force import LAYOUTS, Layout, lay_out
from vcpo_kernels.baselines import WEIGHTINGS
from vcpo_kernels.vcpo_coefficients import AGGREGATIONS, METRICS
from vcpo_kernels.weights import ess_from_moments, merge_moments

NAN, INF = math.nan, math.inf
VOCABULARY = 5
LENGTHS = [3, 1, 0, 2, 4, 2]
REWARDS = [1.0, 0.0, 5.0, 0.25, 1.0, -1.0]
GROUPS = torch.tensor([0, 0, 1, 1, 0, 1])


@dataclasses.dataclass
class Batch:
    """A batch of logits in some layout, with the behaviour policy's logp of each valid token."""

    layout: Layout
    logits: Tensor
    token_ids: Tensor
    behavior_logp: Tensor

    def stats(self, logits: Tensor | None = None) -> vk.TokenStats:
        # No mask: what keeps the other tokens out of the loss is the segments.
        return vk.token_stats(self.logits if logits is None else logits, self.token_ids)

    def loss(self, *args: Any, **switches: Any) -> vk.VCPOOutput:
        rewards, groups = args or (torch.tensor(REWARDS), GROUPS)
        config = vk.VCPOConfig(**switches)
        return vk.vcpo_loss(
            self.stats(),
            self.behavior_logp,
            rewards,
            groups,
            self.layout.segments,
            config,
            **self.count(groups),
        )

    def count(self, groups: Any) -> dict[str, int]:
        return {"num_groups": int(groups.max()) + 1} if isinstance(groups, Tensor) and groups.numel() else {}

    def gradient(self, out: vk.VCPOOutput) -> Tensor:
        (grad,) = torch.autograd.grad(out.loss, self.logits)
        return grad


def make(kind: str, lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    layout = lay_out(kind, lengths)
    logits = torch.randn(*layout.shape, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    token_ids = torch.randint(0, VOCABULARY, layout.shape, generator=generator)
    ragged = [-2 * torch.rand(n, generator=generator, dtype=torch.float64) - 0.5 for n in lengths]
    mu = layout.place([r.to(dtype) for r in ragged], fill=NAN)  # NaN where nothing was sampled
    return Batch(layout, logits, token_ids, mu)


def written_out_gradient(batch: Batch, out: vk.VCPOOutput) -> Tensor:
    """Autograd of -sum_i c_i sum_t m_t log p(y_t), with log_softmax and Python loops, c_i detached."""
    logp = torch.log_softmax(batch.logits, -1).gather(-1, batch.token_ids[..., None])[..., 0]
    loss = (
        -sum(c * values.sum() for c, values in zip(out.coefficients, batch.layout.pick(logp), strict=True))
        + 0 * logp.sum()
    )
    return torch.autograd.grad(loss, batch.logits)[0]


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
    norms = [math.fsum(s.tolist()) for s in pick(score)]
    for weighting, normalize_std, max_weight in itertools.product(WEIGHTINGS, (True, False), (8.0, 1.1, None)):
        switches = {
            "aggregation": aggregation,
            "baseline_weighting": weighting,
            "normalize_std": normalize_std,
            "max_weight": max_weight,
        }
        out = batch.loss(**switches, max_tokens=6)
        expected = brute_force.vcpo(log_weights, LENGTHS, REWARDS, GROUPS.tolist(), norms, 2, max_tokens=6, **switches)
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
    generator = torch.Generator().manual_seed(0)
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


# --- broken and degenerate batches --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("broken", [NAN, -INF, INF], ids=["mu NaN", "mu -inf: L = +inf", "mu +inf: L = -inf"])
def test_a_broken_sequence_is_dropped_counted_and_shrinks_the_ratio(kind: str, broken: float) -> None:
    """Recorded logp holds NaN in practice (TRL). One such token must cost its own sequence, not the batch."""
    batch = make(kind, [3, 2, 4, 2])
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0])
    healthy = batch.loss(rewards, 4)
    first = batch.layout.positions[1][0]
    batch.behavior_logp.view(-1)[first] = broken
    out = batch.loss(rewards, 4)
    gradient = batch.gradient(out)
    assert out.loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient.reshape(-1, VOCABULARY)[batch.layout.positions[1]].any()
    assert out.coefficients[1] == 0
    assert out.metrics["nonfinite_sequences"] == (0 if broken == INF else 1)  # a weight of 0 is a weight
    assert out.metrics["num_sequences"] == 4
    others = [w for i, w in enumerate(healthy.log_weights.tolist()) if i != 1]
    assert out.ess_ratio.item() == pytest.approx(brute_force.ess_ratio([*others, -INF])[1])
    torch.testing.assert_close(gradient, written_out_gradient(batch, out))


def test_a_nan_logit_row_stays_in_its_own_sequence() -> None:
    """NaN from the model, not from the sampler: 0 * NaN must not spread it (prime-rl#2084 was stuck for 12
    h).
    """
    batch = make("padded", [2, 2, 2])
    with torch.no_grad():
        batch.logits[1, 1] = NAN
    out = batch.loss(torch.tensor([1.0, 0.0, 0.5]), 3)
    gradient = batch.gradient(out)
    assert out.metrics["nonfinite_sequences"] == 1
    assert gradient.isfinite().all()
    assert not gradient[1].any()
    assert gradient[0].any()


def test_all_sequences_broken() -> None:
    """Nothing to learn from: zeros, a ratio of 0 and no NaN for the optimizer."""
    batch = make("padded", [2, 2])
    batch.behavior_logp.fill_(NAN)
    out = batch.loss(torch.tensor([1.0, 0.0]), 2)
    assert out.loss == 0
    assert not batch.gradient(out).any()
    assert out.ess_ratio == 0
    assert out.metrics["nonfinite_sequences"] == 2
    assert all(m.isfinite() for m in out.metrics.values())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_empty_sequences_are_in_no_count(kind: str) -> None:
    """Adding sequences without valid tokens, of any reward (NaN too), changes neither loss nor gradient nor
    metrics.
    """
    with_empty, without = make(kind, [3, 0, 2, 4, 0, 2]), make(kind, [3, 2, 4, 2])
    with torch.no_grad():
        for name in ("logits", "token_ids", "behavior_logp"):
            src, dst = getattr(without, name), getattr(with_empty, name)
            tail = src.shape[len(without.layout.shape) :]
            for a, i in zip(without.layout.positions, (0, 2, 3, 5), strict=True):
                dst.view(-1, *tail)[with_empty.layout.positions[i]] = src.reshape(-1, *tail)[a]
    rewards = torch.tensor([1.0, NAN, 0.0, 0.5, INF, 1.0])
    a = with_empty.loss(rewards, torch.tensor([0, 0, 0, 1, 1, 1]))
    b = without.loss(rewards[[0, 2, 3, 5]], 2)
    for name, value in a.metrics.items():
        torch.testing.assert_close(value, b.metrics[name], msg=name)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.baselines, b.baselines)
    torch.testing.assert_close(a.coefficients[[0, 2, 3, 5]], b.coefficients)
    assert a.coefficients[[1, 4]].tolist() == [0, 0]
    gradient = (
        with_empty.layout.pick(with_empty.gradient(a).sum(-1)),
        without.layout.pick(without.gradient(b).sum(-1)),
    )
    torch.testing.assert_close([gradient[0][i] for i in (0, 2, 3, 5)], gradient[1])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("lengths", [[0, 0], []], ids=["all masked", "no sequences"])
def test_a_batch_without_tokens(kind: str, aggregation: str, lengths: list[int]) -> None:
    """A micro-batch whose answers were all truncated away: loss 0, zero gradients and finite metrics, not 0 /
    0.
    """
    batch = make(kind, lengths)
    out = batch.loss(torch.zeros(len(lengths)), 2, aggregation=aggregation, max_tokens=3)
    assert out.loss == 0
    assert not batch.gradient(out).any()
    assert all(m.isfinite() for m in out.metrics.values())
    assert out.ess_ratio == 0
    assert out.coefficients.tolist() == [0.0] * len(lengths)


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.3e5])
def test_equal_rewards_teach_exactly_nothing(reward: float, normalize_std: bool) -> None:
    """sum a R differs from R in the last bit; divided by a tiny std that was a large advantage. Exactly zero
    instead.
    """
    batch = make("padded", [3, 1, 2, 4, 2, 2], dtype=torch.float32)
    out = batch.loss(torch.full((6,), reward), 3, normalize_std=normalize_std)
    assert out.advantages.tolist() == [0.0] * 6
    assert out.loss == 0
    assert not batch.gradient(out).any()
    assert out.metrics["equal_reward_fraction"] == 1


def test_one_sequence_and_groups_of_one() -> None:
    """Its own baseline: no advantage, no gradient, a ratio of 1."""
    batch = make("packed", [3])
    out = batch.loss(torch.tensor([2.0]), 1)
    assert (out.loss.item(), out.ess_ratio.item(), out.advantages.tolist(), out.baselines.tolist()) == (
        0,
        1,
        [0],
        [2],
    )
    assert make("packed", [3, 2]).loss(torch.tensor([2.0, 1.0]), 1).advantages.tolist() == [0, 0]


def test_huge_log_weights_stay_finite_under_truncation() -> None:
    """|L| of thousands is a long answer with a small drift per token: exp overflows, the loss must not."""
    batch = make("padded", [2, 2, 2, 2])
    mu = batch.behavior_logp.view(batch.layout.shape)
    for row, drift in enumerate((5e3, -5e3, 0.0, 1e4)):
        mu[row, 1:3] = -drift
    out = batch.loss(torch.tensor([1.0, 0.0, 0.5, 0.2]), 4)
    assert all(getattr(out, f).isfinite().all() for f in ("loss", "ess", "baselines", "advantages", "coefficients"))
    assert batch.gradient(out).isfinite().all()
    assert out.metrics["truncated_fraction"] == 0.5
    # L = 2e4 has all the weight: its reward is the baseline
    assert out.baselines.tolist() == pytest.approx([0.2])


def test_untruncated_weights() -> None:
    batch = make("padded", [2, 2])
    batch.behavior_logp -= 4  # L near 8 or above: over the default's log 8
    out = batch.loss(
        torch.tensor([1.0, 0.0]), 2, max_weight=None, normalize_std=False, aggregation="seq-mean-token-sum"
    )
    expected = 0.5 * out.log_weights.exp() * (torch.tensor([1.0, 0.0]) - out.baselines)
    torch.testing.assert_close(out.coefficients, expected)
    assert out.metrics["truncated_fraction"] == 0


@pytest.mark.parametrize("kind", LAYOUTS)
def test_permuting_sequences_permutes_the_coefficients(kind: str) -> None:
    """No result depends on the place in the batch."""
    lengths, order = [3, 1, 2, 4], [2, 0, 3, 1]
    a, b = make(kind, lengths), make(kind, [lengths[i] for i in order])
    for i, j in enumerate(order):
        for name in ("token_ids", "behavior_logp"):
            getattr(b, name).view(-1)[b.layout.positions[i]] = getattr(a, name).view(-1)[a.layout.positions[j]]
        with torch.no_grad():
            b.logits.view(-1, VOCABULARY)[b.layout.positions[i]] = a.logits.view(-1, VOCABULARY)[a.layout.positions[j]]
    rewards, groups = torch.tensor([1.0, 0.0, 0.25, 0.5]), torch.tensor([0, 0, 1, 1])
    first, second = a.loss(rewards, groups), b.loss(rewards[order], groups[order])
    torch.testing.assert_close(second.coefficients, first.coefficients[order])
    torch.testing.assert_close(second.loss, first.loss)


# --- torch.library and torch.compile ------------------------------------------------------------------------


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


def compiled_equals_eager(backend: str, kind: str, shift: bool, dynamic: bool | None = None) -> None:
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


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_compiled_without_graph_breaks_equals_eager(kind: str, shift: bool) -> None:
    """token_stats -> vcpo_loss -> backward under torch.compile(fullgraph=True)."""
    compiled_equals_eager("aot_eager", kind, shift)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor_equals_eager(dynamic: bool | None) -> None:
    compiled_equals_eager("inductor", "padded", True, dynamic)


# --- errors -------------------------------------------------------------------------------------------------


def call(**changes: Any) -> vk.VCPOOutput:
    """vcpo_loss on a healthy batch of four sequences of two tokens, with some arguments changed."""
    logits, ids = torch.zeros(4, 2, VOCABULARY), torch.zeros(4, 2, dtype=torch.int64)
    arguments: dict[str, Any] = {
        "stats": vk.token_stats(logits, ids),
        "behavior_logp": torch.zeros(4, 2),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "groups": 2,
        "segments": vk.Segments.padded(torch.ones(4, 2)),
        "config": None,
    }
    return vk.vcpo_loss(**(arguments | changes))


BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "stats tensor": (
        {"stats": torch.zeros(4, 2)},
        TypeError,
        "stats must be the TokenStats that token_stats returned",
    ),
    "segments mask": (
        {"segments": torch.ones(4, 2)},
        TypeError,
        r"segments must be a Segments.*Segments\.padded\(mask\)",
    ),
    "segments of another batch": (
        {"segments": vk.Segments.padded(torch.ones(4, 3))},
        ValueError,
        r"stats must have the segments' shape \(4, 3\)",
    ),
    "config dict": (
        {"config": {"max_weight": 8.0}},
        TypeError,
        r"config must be a VCPOConfig.*VCPOConfig\(\.\.\.\)",
    ),
    "behaviour None": (
        {"behavior_logp": None},
        TypeError,
        r"behavior_logp must be a torch\.Tensor, got None",
    ),
    "behaviour list": (
        {"behavior_logp": [[0.0] * 2] * 4},
        TypeError,
        r"behavior_logp must be a torch\.Tensor",
    ),
    "behaviour int": (
        {"behavior_logp": torch.zeros(4, 2).long()},
        TypeError,
        "behavior_logp must be one of bfloat16",
    ),
    "behaviour unshifted": (
        {"behavior_logp": torch.zeros(4, 1)},
        ValueError,
        r"behavior_logp must have the segments' shape \(4, 2\)",
    ),
    "behaviour device": (
        {"behavior_logp": torch.zeros(4, 2, device="meta")},
        ValueError,
        "behavior_logp is on meta",
    ),
    "rewards list": (
        {"rewards": [1.0, 0.0, 1.0, 1.0]},
        TypeError,
        r"rewards must be a torch\.Tensor, got \[1\.0",
    ),
    "rewards column": (
        {"rewards": torch.ones(4, 1)},
        ValueError,
        r"rewards must have shape \(4,\) \(one reward per sequence\).*rewards\.reshape\(-1\)",
    ),
    "rewards per token": ({"rewards": torch.ones(4, 2)}, ValueError, "one reward per sequence"),
    "rewards NaN": (
        {"rewards": torch.tensor([1, 0, NAN, 1])},
        ValueError,
        "rewards of sequences with valid tokens must be finite, got nan at index 2",
    ),
    "rewards inf": (
        {"rewards": torch.tensor([1, INF, 0, 1])},
        ValueError,
        "must be finite, got inf at index 1",
    ),
    "rewards device": (
        {"rewards": torch.ones(4, device="meta")},
        ValueError,
        "rewards is on meta but stats is on cpu",
    ),
    "groups list": ({"groups": [0, 0, 1, 1]}, TypeError, r"groups must be an int .*torch\.tensor\(ids\)"),
    "groups not dividing": ({"groups": 3}, ValueError, "groups=3 must divide the 4 sequences"),
    "groups shape": (
        {"groups": torch.zeros(4, 1, dtype=torch.int64)},
        ValueError,
        r"groups must have shape \(4,\)",
    ),
    "groups raw": ({"groups": torch.tensor([11, 11, 12, 12])}, ValueError, r"groups must lie in \[0, 4\)"),
    "groups device": (
        {"groups": torch.zeros(4, dtype=torch.int64, device="meta")},
        ValueError,
        "groups is on meta",
    ),
    "num_groups with int": ({"num_groups": 2}, ValueError, "num_groups=2 goes with group ids"),
    "num_groups str": (
        {"num_groups": "2", "groups": torch.tensor([0, 0, 1, 1])},
        TypeError,
        "num_groups must be an int",
    ),
    "norms shape": (
        {"config": vk.VCPOConfig(score_norm=torch.ones(4, 1))},
        ValueError,
        r"config\.score_norm must have shape \(4,\)",
    ),
    "norms negative": (
        {"config": vk.VCPOConfig(score_norm=-torch.ones(4))},
        ValueError,
        r"config\.score_norm must hold finite values >= 0.*-1\.0 at index 0",
    ),
    "norms NaN": (
        {"config": vk.VCPOConfig(score_norm=torch.tensor([1, NAN, 1, 1]))},
        ValueError,
        "score_norm must hold finite.*nan at index 1",
    ),
    "norms device": (
        {"config": vk.VCPOConfig(score_norm=torch.ones(4, device="meta"))},
        ValueError,
        r"config\.score_norm is on meta",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case: str) -> None:
    changes, error, message = BAD_INPUT[case]
    with pytest.raises(error, match="vcpo_loss: .*" + message):
        call(**changes)


def test_packed_token_counts_must_agree() -> None:
    """Packed segments do not know N; two tensors of different N would fail inside the op, unnamed."""
    stats = vk.token_stats(torch.zeros(1, 6, VOCABULARY), torch.zeros(1, 6, dtype=torch.int64))
    seg = vk.Segments.packed(torch.tensor([0, 2, 5]))
    with pytest.raises(
        ValueError, match=r"vcpo_loss: behavior_logp must have shape \(6,\) \(as many tokens as stats\)"
    ):
        vk.vcpo_loss(stats, torch.zeros(5), torch.ones(2), 2, seg)


def test_the_longest_possible_sequence_must_be_known_for_sum_norm() -> None:
    config = vk.VCPOConfig(aggregation="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match=r"needs config\.max_tokens for packed.*VCPOConfig\(max_tokens=\.\.\.\)"):
        make("packed").loss(aggregation="seq-mean-token-sum-norm")
    # Padded: T = 2. Four sequences, weight (1/5)^2, advantage 1.
    assert call(config=config).coefficients[0] == pytest.approx(1 / (4 * 2) / 25)


def test_a_broken_norm_of_a_dropped_sequence_is_no_error() -> None:
    """The exact norm of a sequence with NaN logp is NaN; the sequence is dropped and counted, as for any
    other source.
    """
    mu = torch.zeros(4, 2)
    mu[1] = NAN
    out = call(behavior_logp=mu, config=vk.VCPOConfig(score_norm=torch.tensor([1.0, NAN, 1.0, 1.0])))
    assert out.metrics["nonfinite_sequences"] == 1


def test_untruncated_weights_that_would_overflow_are_dropped_and_counted() -> None:
    """max_weight=None at L = 200: exp would be inf, the loss NaN and every gradient with it."""
    log_w = torch.tensor([0.0, 79.0, 81.0, 200.0])
    logp = torch.zeros(4, 1, requires_grad=True)
    stats = vk.TokenStats(logp, torch.zeros(4, 1), torch.ones(4, 1), torch.zeros(4, 1))
    seg = vk.Segments.padded(torch.ones(4, 1))
    out = vk.vcpo_loss(
        stats, -log_w.unsqueeze(1), torch.tensor([1.0, 0.0, 1.0, 0.0]), 2, seg, vk.VCPOConfig(max_weight=None)
    )
    assert out.metrics["nonfinite_sequences"] == 2
    assert out.coefficients[2:].tolist() == [0.0, 0.0]
    out.loss.backward()
    assert bool(logp.grad.isfinite().all())


BAD_CONFIG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "max_weight zero": ({"max_weight": 0}, ValueError, "max_weight must be finite and > 0, got 0"),
    "max_weight negative": (
        {"max_weight": -1.0},
        ValueError,
        r"max_weight must be finite and > 0, got -1\.0",
    ),
    "max_weight inf": ({"max_weight": INF}, ValueError, "max_weight must be finite"),
    "max_weight NaN": ({"max_weight": NAN}, ValueError, "max_weight must be finite"),
    "max_weight str": (
        {"max_weight": "8"},
        TypeError,
        r"max_weight must be a float > 0 or None, got '8' \(str\)",
    ),
    "max_weight bool": ({"max_weight": True}, TypeError, "max_weight must be a float > 0 or None, got True"),
    "num_sequences tensor": (
        {"num_sequences": torch.tensor(8)},
        TypeError,
        r"num_sequences must be a float.*float\(num_sequences\)",
    ),
    "num_tokens zero": ({"num_tokens": 0}, ValueError, "num_tokens must be finite and > 0"),
    "max_tokens": ({"max_tokens": -3}, ValueError, "max_tokens"),
    "ess_max_weight": ({"ess_max_weight": 0.0}, ValueError, "ess_max_weight"),
    "weighting": (
        {"baseline_weighting": "opob"},
        ValueError,
        "baseline_weighting must be one of 'paper', 'estimator'",
    ),
    "aggregation": (
        {"aggregation": "mean"},
        ValueError,
        "aggregation must be one of 'seq-mean-token-mean'.*got 'mean'",
    ),
    "normalize_std": ({"normalize_std": 1}, TypeError, "normalize_std must be a bool, got 1"),
    "score_norm": (
        {"score_norm": "exact"},
        ValueError,
        r"score_norm must be 'logit' or a tensor \[B\] .*got 'exact'",
    ),
    "score_norm list": ({"score_norm": [1.0]}, ValueError, r"score_norm must be 'logit' or a tensor \[B\]"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_config_is_refused_by_field(case: str) -> None:
    fields, error, message = BAD_CONFIG[case]
    with pytest.raises(error, match="VCPOConfig: " + message):
        vk.VCPOConfig(**fields)


def test_numpy_numbers_are_numbers() -> None:
    """Configs read from YAML by way of numpy, or computed: np.float32(8.0) is not a Python float, and means
    the same.
    """
    np = pytest.importorskip("numpy")
    config = vk.VCPOConfig(
        max_weight=np.float32(8.0),
        ess_max_weight=np.float64(2.0),
        num_sequences=np.int64(4),
        num_tokens=np.int32(8),
        max_tokens=np.float16(2.0),
        normalize_std=np.bool_(True),
    )
    plain = vk.VCPOConfig(ess_max_weight=2.0, num_sequences=4, num_tokens=8, max_tokens=2)
    assert config == plain
    assert torch.equal(call(config=config, groups=np.int64(2)).coefficients, call(config=plain).coefficients)


def test_integers_and_replace() -> None:
    config = dataclasses.replace(vk.VCPOConfig(), max_weight=4, num_sequences=16)
    assert (config.max_weight, config.num_sequences) == (4.0, 16.0)
