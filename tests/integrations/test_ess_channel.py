"""From a trainer's loss function to the optimizer's rate: each micro-batch counts once, a skipped step leaves nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels.integrations import _ess_channel
from vcpo_kernels.integrations._given_advantages import weighted_advantages

QUARTER = torch.tensor([0.0, -1e4, -1e4, -1e4])  # ESS 1 of 4: the factor of the rate is 1/2
ALL = torch.zeros(4)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_ess_channel, "_PROCESS", _ess_channel._Process())
    yield
    _ess_channel.stop_expecting()
    for rate in _ess_channel.attached():
        _ess_channel.detach(rate)


def announced(weight: Tensor, log_weights: Tensor) -> Tensor:
    """A loss of one-token sequences with the given L_i, announced to the channel."""
    logp = weight + torch.zeros(log_weights.numel(), 1)
    mu = logp.detach() - log_weights[:, None]
    result = weighted_advantages(
        "test", logp, mu, torch.ones_like(logp), vk.Segments.padded(torch.ones_like(logp)), 8.0
    )
    loss = result.surrogate(logp).sum()
    _ess_channel.publish("test", result, loss, "Attach one.")
    return loss


def step(optimizer: torch.optim.Optimizer, weight: Tensor) -> float:
    """How far a step goes for a gradient of 1 and a rate of 1."""
    before = weight.item()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return before - weight.item()


def new() -> tuple[Tensor, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.zeros(1))
    return weight, torch.optim.SGD([weight], lr=1.0)


def test_attached_rate_hears_every_loss_once() -> None:
    weight, optimizer = new()
    rate = _ess_channel.attach(optimizer)
    announced(weight, ALL).backward()
    announced(weight, QUARTER).backward()
    expected = vk.effective_sample_size(torch.cat([ALL, QUARTER])).ratio.sqrt()
    assert step(optimizer, weight) == pytest.approx(expected.item())
    announced(weight, QUARTER).backward()
    assert step(optimizer, weight) == pytest.approx(0.5)
    with torch.no_grad():
        announced(weight, QUARTER)  # an evaluation is no part of a step
    announced(weight, ALL).backward()
    assert step(optimizer, weight) == pytest.approx(1.0)
    assert rate.ratio == 1


def test_skipped_step_leaves_nothing() -> None:
    """verl drops a step of non-finite gradients by zero_grad alone."""
    weight, optimizer = new()
    _ess_channel.attach(optimizer)
    loss = announced(weight, QUARTER)
    loss -= 0.1 * weight.sum()  # verl subtracts the entropy in place, on the very tensor that is watched
    loss.backward()
    optimizer.zero_grad()
    announced(weight, ALL).backward()
    assert step(optimizer, weight) == pytest.approx(1.0)


def test_next_optimizer_is_scaled_from_its_first_step() -> None:
    weight, optimizer = new()
    _ess_channel.attach_to_next_optimizer(rule="linear")
    announced(weight, QUARTER).backward()
    assert step(optimizer, weight) == pytest.approx(0.25)
    announced(weight, ALL).backward()
    assert step(optimizer, weight) == pytest.approx(1.0)
    assert optimizer.param_groups[0]["lr"] == 1.0
    other_weight, other = new()
    assert step(other, other_weight) == pytest.approx(1.0), "only the first optimizer is attached"
    with pytest.raises(RuntimeError, match="has an EssLearningRate already"):
        _ess_channel.attach_to_next_optimizer()


def test_called_off() -> None:
    _ess_channel.attach_to_next_optimizer()
    _ess_channel.stop_expecting()
    weight, optimizer = new()
    assert step(optimizer, weight) == 1.0
    assert not _ess_channel.attached()


def test_unattached_loss_says_so_once() -> None:
    weight, _ = new()
    with pytest.warns(UserWarning, match="test: no optimizer is attached, so steps are not scaled by ESS. Attach one"):
        announced(weight, QUARTER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        announced(weight, QUARTER)
