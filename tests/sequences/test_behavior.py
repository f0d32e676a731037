"""Where log mu came from: what is said, when, and that healthy batches are left alone."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels import objectives
from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations._given_advantages import weighted_advantages
from vcpo_kernels.sequences import behavior

B, T, V = 8, 40, 50


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behavior, "_said", set())


def batch() -> tuple[vk.TokenStats, Tensor, Tensor]:
    """Statistics of tokens sampled from a somewhat older policy, whose log mu is exact, and that policy's logits."""
    old = torch.randn(B, T, V) * 2
    ids = torch.distributions.Categorical(logits=old).sample()
    mu = torch.log_softmax(old, -1).gather(-1, ids[..., None])[..., 0]
    return vk.token_stats((old + 0.1 * torch.randn(B, T, V)).requires_grad_(), ids), mu, old


LOSSES: dict[str, Callable[[vk.TokenStats, Tensor, vk.Segments], Any]] = {
    "vcpo_loss": lambda stats, mu, seg: vk.vcpo_loss(stats, mu, torch.rand(B), 4, seg),
    "reinforce": lambda stats, mu, seg: objectives.reinforce(stats, mu, torch.randn(B), seg),
    "ppo_clip": lambda stats, mu, seg: objectives.ppo_clip(stats, mu, torch.randn(B), seg, proximal_logp=mu),
    "trainer": lambda stats, mu, seg: weighted_advantages(
        Check("trainer"), stats.logp, mu, torch.randn(B, T), seg, 8.0
    ),
}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Callable[[vk.TokenStats, Tensor], Any]:
    return lambda stats, mu: LOSSES[request.param](stats, mu, vk.Segments.padded(torch.ones(B, T)))


def in_kept_set(old: Tensor, ids_logp: Tensor, top: float) -> Tensor:
    """log mu over the nucleus: the token's probability over the kept mass."""
    p = torch.softmax(old, -1).sort(-1, descending=True).values
    kept = torch.where(p.cumsum(-1) - p < top, p, 0.0).sum(-1)
    return ids_logp - kept.log()


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "rolled": (lambda mu, old: mu.roll(1, 1), r"nats a token: off by one\? It fits one position late"),
    "rolled back": (lambda mu, old: mu.roll(-1, 1), r"off by one\? It fits one position early"),
    "probabilities": (lambda mu, old: mu.exp(), r"at most 0\. Probabilities\? Take behavior_logp\.log\(\)"),
    "nll": (lambda mu, old: -mu, r"Negative logs\? Take -behavior_logp"),
    "other tokens": (lambda mu, old: mu[torch.randperm(B)][:, torch.randperm(T)], "other token ids or attention masks"),
    "temperature": (lambda mu, old: mu * 3, "another temperature"),
    "nan": (lambda mu, old: torch.full_like(mu, math.nan), "NaN at all 320 valid tokens. Did the sampler record"),
    "-inf": (lambda mu, old: torch.full_like(mu, -math.inf), "not finite at all 320 valid tokens"),
}


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize("what", WRONG)
def test_wrong_log_mu_is_named(what: str, loss: Callable[[vk.TokenStats, Tensor], Any]) -> None:
    stats, mu, old = batch()
    change, message = WRONG[what]
    with pytest.warns(UserWarning, match=message):
        loss(stats, change(mu, old))


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize("top", (0.9, 0.95, 0.99))
def test_sampling_from_a_kept_set_is_named(top: float, loss: Callable[[vk.TokenStats, Tensor], Any]) -> None:
    """On-policy, but for what the sampler left out: every weight falls, and ESS looks perfect."""
    old = batch()[2]
    ids = torch.distributions.Categorical(logits=old).sample()
    exact = torch.log_softmax(old, -1).gather(-1, ids[..., None])[..., 0]
    stats = vk.token_stats(old.clone().requires_grad_(), ids)
    with pytest.warns(UserWarning, match=r"top-p, top-k, min-p"):
        loss(stats, in_kept_set(old, exact, top))


@pytest.mark.cpu_only("checks read values only on a CPU")
def test_a_ratio_of_one_is_named_once(loss: Callable[[vk.TokenStats, Tensor], Any]) -> None:
    stats, _, _ = batch()
    with pytest.warns(UserWarning, match=r"the ratio pi / mu is identically 1.*the sampler recorded") as said:
        _three_times(loss, stats)
    assert len([w for w in said if "identically" in str(w.message)]) == 1


def _three_times(loss: Callable[[vk.TokenStats, Tensor], Any], stats: vk.TokenStats) -> None:
    for _ in range(3):
        loss(stats, stats.logp.detach())


def test_stale_rollouts_are_left_alone(loss: Callable[[vk.TokenStats, Tensor], Any]) -> None:
    """A drift of a tenth of a nat a token, of both signs; a few tokens that the sampler could not score; masked rubbish."""
    stats, mu, _ = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(stats, mu)
        mu[0, 3] = math.nan
        loss(stats, mu)
    mask = torch.ones(B, T)
    mask[:, 30:] = 0
    mu[:, 30:] = 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOSSES["vcpo_loss"](stats, mu, vk.Segments.padded(mask))


@pytest.mark.parametrize("name", ("vcpo_loss", "reinforce", "trainer"))
def test_metrics_say_it_everywhere(name: str) -> None:
    """What is not read on a GPU is logged: the mean magnitude of the tokens' log-ratios, and how one-sided they are."""
    stats, mu, _ = batch()
    mask = torch.rand(B, T) < 0.7
    mu[0, 0], mask[0, 0] = math.nan, True
    out = LOSSES[name](stats, mu, vk.Segments.padded(mask))
    ratio = (stats.logp.detach() - mu)[mask]
    ratio = ratio[ratio.isfinite()].double()
    assert out.metrics["log_ratio_abs_mean"].item() == pytest.approx(ratio.abs().mean().item(), rel=1e-5)
    assert out.metrics["log_ratio_negative_fraction"].item() == pytest.approx((ratio < 0).double().mean().item())


MEANS: dict[str, tuple[tuple[float, float, float], str | None]] = {
    "far": ((10, 3.1, 0.5), "differ by 3.1 nats a token: off by one"),
    "a kept set": ((64, 0.05, 0.99), r"log pi < log mu at 99% of the tokens, by 0.05 nats a token.*top-p"),
    "too few tokens": ((63, 0.05, 1.0), None),
    "a sampler's rounding": ((1000, 0.004, 1.0), None),
    "stale": ((1000, 0.3, 0.7), None),
    "nothing": ((1000, math.nan, math.nan), None),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_that_a_trainer_logs_say_it_too(name: str) -> None:
    """On a GPU, where nothing else may be read; once a cause, whoever found it."""
    means, message = MEANS[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            behavior.warn_of_means("Trainer", *means)
    assert len(said) == (message is not None)
    if message is not None:
        assert re.match(f"Trainer: .*{message}", str(said[0].message))
