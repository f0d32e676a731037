"""vcpo_loss on broken and degenerate batches: dropped, counted, and never NaN."""

from __future__ import annotations

import pytest
import torch

from tests.sequences import brute_force
from tests.sequences.brute_force import LAYOUTS
from tests.sequences.vcpo_batches import INF, NAN, VOCABULARY, make, written_out_gradient
from vcpo_kernels.sequences.aggregation import AGGREGATIONS


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
    out = batch.loss(torch.tensor([2.0]), torch.tensor([0]))
    assert (out.loss.item(), out.ess_ratio.item(), out.advantages.tolist(), out.baselines.tolist()) == (
        0,
        1,
        [0],
        [2],
    )
    assert make("packed", [3, 2]).loss(torch.tensor([2.0, 1.0]), torch.tensor([0, 1])).advantages.tolist() == [0, 0]


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
