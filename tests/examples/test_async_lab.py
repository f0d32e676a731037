"""The lab's promises on training: exact lag, runs that do not see each other, losses that are what they are called."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from examples.async_lab.methods import METHODS
from examples.async_lab.model import Transformer
from examples.async_lab.trainer import Batch, Rollouts, Trainer, batch_of

from .async_lab import batch_logp, trainer

pytestmark = pytest.mark.filterwarnings("ignore:vcpo_kernels. .* slow reference backend")

# --- lag ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_rollouts_come_from_the_policy_lag_steps_ago(lag: int) -> None:
    lab = trainer(lag=lag, steps=6, rate=1e-2)
    versions: list[Transformer] = []  # the parameters before each learner step
    learn = lab.learn

    def checked(rollouts: Rollouts) -> list[dict[str, float]]:
        step = len(versions)
        versions.append(copy.deepcopy(lab.stack.module(0)))
        assert rollouts.version == max(0, step - lag)
        batch = batch_of(rollouts, 0)
        close = [torch.allclose(batch.logp.double(), batch_logp(m, batch), atol=1e-5) for m in versions]
        assert close == [version == rollouts.version for version in range(len(versions))]
        return learn(rollouts)

    lab.learn = checked  # type: ignore[method-assign]
    for _ in range(6):
        lab.train_step()
    assert len(versions) == 6


def test_every_batch_is_sampled_and_learned_from_once() -> None:
    lab = trainer(lag=3, steps=5)
    for _ in range(5):
        lab.train_step()
    assert lab.sampled == 5
    assert not lab.queue


def test_a_lag_beyond_the_run_samples_no_more_than_the_run_needs() -> None:
    assert len(trainer(lag=100, steps=2).queue) == 2


# --- runs beside each other ---------------------------------------------------------------------------------


def test_a_run_does_not_depend_on_the_runs_beside_it() -> None:
    together = Trainer(
        [trainer(m, lag=2, steps=5, rate=r, seed=s).config for m, r, s in [("vcpo", 1e-2, 0), ("gspo", 1e-3, 1)]],
        trainer().stack.module(0),
    )
    for run, config in enumerate(together.configs):
        alone = Trainer([config], trainer().stack.module(0))
        assert torch.equal(alone.queue[0].responses[0], together.queue[0].responses[run])
    figures = [together.train_step() for _ in range(5)]
    for run, config in enumerate(together.configs):
        alone = Trainer([config], trainer().stack.module(0))
        apart = [alone.train_step()[0] for _ in range(5)]
        for name in ("reward", "ess_ratio", "grad_norm", "rate_scale"):
            assert [f[name] for f in apart] == pytest.approx([f[run][name] for f in figures], rel=1e-4)
        torch.testing.assert_close(alone.stack.values[0], together.stack.values[run], rtol=1e-4, atol=1e-6)
        assert alone.evaluate()[0] == pytest.approx(together.evaluate()[run])


def test_runs_of_different_shapes_are_refused() -> None:
    configs = [trainer(lag=1).config, trainer(lag=2).config]
    with pytest.raises(ValueError, match="must agree in all but method, rate, seed and clip"):
        Trainer(configs, trainer().stack.module(0))


# --- methods ------------------------------------------------------------------------------------------------


def stale(method: str) -> tuple[Trainer, Batch]:
    """A trainer whose next rollouts are off-policy, and those."""
    lab = trainer(method, lag=3, steps=8, rate=1e-3)
    for _ in range(3):
        lab.train_step()
    return lab, batch_of(lab.queue[0], 0)


def token_weights(method: str, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Each method's factor before A_i grad logp_t, from its definition and nothing of the package. log_ratio [B, T]."""
    r, w, good = log_ratio.exp(), log_ratio.sum(1, keepdim=True).exp(), advantages.unsqueeze(1) > 0
    ppo = torch.where(torch.where(good, r > 1.2, r < 0.8), 0.0, r)
    s = log_ratio.mean(1, keepdim=True).exp()
    drifted = ~good & (-log_ratio.mean(1, keepdim=True) > 0.5)
    table = {
        "none": torch.ones_like(r),
        "token-tis": r.clamp(max=2.0),
        "seq-mis": torch.where(w <= 8.0, w, 0.0),
        "icepop": torch.where((r >= 0.5) & (r <= 5.0), r, 0.0),
        "ppo-clip": ppo,
        "gspo": torch.where(torch.where(good, s > 1 + 4e-4, s < 1 - 3e-4), 0.0, s),
        "cispo": r.clamp(max=5.0),
        "opsm": torch.where(drifted, 0.0, ppo),
        "topr": torch.where(good, 1.0, w.clamp(max=1.0)),
    }
    return table.get(method, w.clamp(max=8.0))


def second_moment_weights(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """M2PO's: of the tokens that moved where the advantage pushes, the farthest go until the mean square is 0.04."""
    signs = advantages.sign().unsqueeze(1)
    pushed = [(float(d) ** 2, i) for i, d in enumerate((log_ratio * signs.abs()).flatten())]
    pushed = [(d, i) for d, i in pushed if float((log_ratio * signs).flatten()[i]) > 0]
    kept = sorted(pushed)
    while kept and sum(d for d, _ in kept) / len(kept) > 0.04:
        kept.pop()
    weights = log_ratio.exp().flatten()
    for i in {i for _, i in pushed} - {i for _, i in kept}:
        weights[i] = 0.0
    return weights.view_as(log_ratio)


def exact_norms(model: Transformer, batch: Batch) -> Tensor:
    """Squared norm of each sequence's gradient of log pi, one backward pass for each."""
    norms = []
    for logp in batch_logp(model, batch).sum(1):
        gradients = torch.autograd.grad(logp, list(model.parameters()), retain_graph=True)
        norms.append(sum(float(g.double().square().sum()) for g in gradients))
    return torch.tensor(norms)


def written_by_hand(method: str, model: Transformer, batch: Batch) -> Tensor:
    """A surrogate with the method's gradient, in float64."""
    logp = batch_logp(model, batch)
    log_ratio = (logp - batch.logp.double()).detach()
    log_w, rewards = log_ratio.sum(1), batch.rewards.double().view(-1, 4)
    a = torch.full_like(rewards, 0.25)
    if method in ("opob-exact", "vcpo-exact"):
        a = (2 * log_w + exact_norms(model, batch).log()).view(-1, 4).softmax(1)
    if method in ("opob", "vcpo"):
        prompts = batch.prompts.repeat_interleave(4, 0)
        p = model(torch.cat([prompts, batch.responses], 1)).double()[:, 12:-1].softmax(-1).detach()
        one_hot = torch.nn.functional.one_hot(batch.responses, 11)
        a = (2 * log_w + (one_hot - p).square().sum((1, 2)).log()).view(-1, 4).softmax(1)
    std = rewards.std(1, correction=0, keepdim=True)
    advantages = torch.where(std > 1e-8, (rewards - (a * rewards).sum(1, keepdim=True)) / std, 0.0).flatten()
    weights = token_weights(method, log_ratio, advantages)
    if method == "m2po":
        weights = second_moment_weights(log_ratio, advantages)
    return -(weights * advantages.unsqueeze(1) * logp).mean()


def hand_gradient(method: str, model: Transformer, batch: Batch) -> Tensor:
    gradients = torch.autograd.grad(written_by_hand(method, model, batch), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("method", METHODS)
def test_gradient_equals_the_formula_written_out(method: str) -> None:
    lab, batch = stale(method)
    expected = hand_gradient(method, lab.stack.module(0), batch)
    out = lab.learners[0].gradient(batch)
    assert out.ess_ratio < 0.99  # else the batch says nothing about weights
    assert float(expected.abs().max()) > 0
    actual = lab.stack.gradients[0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_methods_differ_in_no_aggregation() -> None:
    assert {m.objective.aggregation for m in METHODS.values() if m.objective} == {"seq-mean-token-mean"}


def test_the_sequence_mask_drops_what_truncation_keeps() -> None:
    lab, batch = stale("seq-mis")
    heavy = torch.tensor([1.0] + [0.0] * 7).unsqueeze(1)  # twelve tokens later: one sequence of weight e^12
    batch = replace(batch, logp=batch_logp(lab.stack.module(0), batch).detach().float() - heavy)
    log_w = lab.learners[0].gradient(batch).log_weights
    assert log_w[0] > math.log(8.0) > log_w[1:].max()
    masked = lab.stack.gradients[0].clone()
    expected = hand_gradient("seq-mis", lab.stack.module(0), batch)
    torch.testing.assert_close(masked, expected, rtol=1e-3, atol=1e-5)
    lab.learners[0].method = METHODS["seq-tis"]
    lab.learners[0].gradient(batch)
    assert not torch.allclose(masked, lab.stack.gradients[0], rtol=1e-2)


@pytest.mark.parametrize(
    ("method", "scaled"), [("seq-tis", False), ("opob", False), ("ess", True), ("vcpo", True), ("vcpo-exact", True)]
)
def test_the_step_is_scaled_by_the_root_of_the_ess_ratio(method: str, scaled: bool) -> None:
    lab, _ = stale(method)
    (figures,) = lab.train_step()
    assert figures["rate_scale"] == pytest.approx(math.sqrt(figures["ess_ratio"]) if scaled else 1.0, rel=1e-5)
    assert lab.learners[0].optimizer.param_groups[0]["lr"] == lab.config.rate


def test_the_optimizer_moves_the_stack_that_is_sampled_from() -> None:
    lab = trainer("none", "vcpo", lag=0, rate=1e-2)
    before = lab.stack.stacked["head.weight"].clone()
    lab.train_step()
    moved = (lab.stack.stacked["head.weight"] - before).flatten(1).norm(dim=1)
    assert (moved > 0).all()
    assert torch.equal(lab.stack.module(1).head.weight, lab.stack.stacked["head.weight"][1])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_step_runs_on_every_backend(backend: str) -> None:
    with vk.use_backend(backend):
        assert math.isfinite(trainer("vcpo").train_step()[0]["grad_norm"])
