"""From a trainer's loss function to the optimizer's rate: each micro-batch counts once, a skipped step leaves nothing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import vcpo_kernels as vk
from tests.integrations.two_ranks import ATTACHED, announce, results
from vcpo_kernels.integrations import _ess_channel

QUARTER = torch.tensor([0.0, -1e4, -1e4, -1e4])  # ESS 1 of 4: the factor of the rate is 1/2
ALL = torch.zeros(4)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_ess_channel, "_PROCESS", _ess_channel._Process())
    yield
    _ess_channel.stop_expecting()
    for rate in _ess_channel.attached():
        _ess_channel.detach(rate)


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
    announce(weight, ALL).backward()
    announce(weight, QUARTER).backward()
    expected = vk.effective_sample_size(torch.cat([ALL, QUARTER])).ratio.sqrt()
    assert step(optimizer, weight) == pytest.approx(expected.item())
    announce(weight, QUARTER).backward()
    assert step(optimizer, weight) == pytest.approx(0.5)
    with torch.no_grad():
        announce(weight, QUARTER)  # an evaluation is no part of a step
    announce(weight, ALL).backward()
    assert step(optimizer, weight) == pytest.approx(1.0)
    assert rate.ratio == 1


def test_skipped_step_leaves_nothing() -> None:
    """verl drops a step of non-finite gradients by zero_grad alone."""
    weight, optimizer = new()
    _ess_channel.attach(optimizer)
    loss = announce(weight, QUARTER)
    loss -= 0.1 * weight.sum()  # verl subtracts the entropy in place, on the very tensor that is watched
    loss.backward()
    optimizer.zero_grad()
    announce(weight, ALL).backward()
    assert step(optimizer, weight) == pytest.approx(1.0)


def test_next_optimizer_is_scaled_from_its_first_step() -> None:
    weight, optimizer = new()
    _ess_channel.attach_to_next_optimizer(rule="linear")
    announce(weight, QUARTER).backward()
    assert step(optimizer, weight) == pytest.approx(0.25)
    announce(weight, ALL).backward()
    assert step(optimizer, weight) == pytest.approx(1.0)
    assert optimizer.param_groups[0]["lr"] == 1.0
    other_weight, other = new()
    assert step(other, other_weight) == pytest.approx(1.0), "only the first optimizer is attached"
    with pytest.raises(RuntimeError, match="has an EssLearningRate already"):
        _ess_channel.attach_to_next_optimizer()


def test_step_skipped_before_the_first_leaves_nothing() -> None:
    """What waits for an optimizer goes with its gradients, whoever clears them; what was not backpropagated stays."""
    weight, optimizer = new()
    plain = inspect.signature(optimizer.zero_grad)
    _ess_channel.attach_to_next_optimizer()
    assert inspect.signature(optimizer.zero_grad) == plain
    announce(weight, QUARTER).backward()
    optimizer.zero_grad()
    loss = announce(weight, ALL)
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    assert step(optimizer, weight) == pytest.approx(1.0)
    (rate,) = _ess_channel.attached()
    assert rate.ratio == 1
    announce(weight, QUARTER).backward()
    assert step(optimizer, weight) == pytest.approx(0.5)


@pytest.mark.parametrize("how", ["first step", "stop_expecting", "remove"])
def test_what_is_replaced_meanwhile_is_put_back(how: str) -> None:
    method = torch.optim.Optimizer.zero_grad
    expectation = _ess_channel.attach_to_next_optimizer()
    assert torch.optim.Optimizer.zero_grad is not method
    weight, optimizer = new()
    if how == "first step":
        announce(weight, ALL).backward()
        step(optimizer, weight)
    elif how == "remove":
        expectation.remove()
    else:
        _ess_channel.stop_expecting()
    assert torch.optim.Optimizer.zero_grad is method
    assert _ess_channel._PROCESS.expecting is None


def test_other_hooks_on_every_step() -> None:
    """torch walks through global hooks while the rate attaches: a later one must still be reached."""
    weight, optimizer = new()
    _ess_channel.attach_to_next_optimizer()
    calls = []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    try:
        announce(weight, QUARTER).backward()
        assert step(optimizer, weight) == pytest.approx(0.5)
        announce(weight, QUARTER).backward()
        assert step(optimizer, weight) == pytest.approx(0.5)
    finally:
        handle.remove()
    assert calls == [1, 1]


def test_called_off() -> None:
    _ess_channel.attach_to_next_optimizer()
    _ess_channel.stop_expecting()
    weight, optimizer = new()
    assert step(optimizer, weight) == 1.0
    assert not _ess_channel.attached()


def test_unattached_loss_says_so_once() -> None:
    weight, _ = new()
    with pytest.warns(UserWarning, match="test: no optimizer is attached, so steps are not scaled by ESS. Attach one"):
        announce(weight, QUARTER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        announce(weight, QUARTER)


def test_ranks_share_one_ess() -> None:
    """verl's optimizer and a rate attached at the first step take the ESS of the union; a rank without losses takes part."""
    pytest.importorskip("transformers", reason="the two ranks run the example loops too: pip install transformers")
    pytest.importorskip("accelerate", reason="the two ranks run the example loops too: pip install accelerate")
    first, second = (rank["attached"] for rank in results())
    assert first == second
    for case, per_rank in ATTACHED.items():
        union = vk.effective_sample_size(torch.tensor(per_rank[0] + per_rank[1])).ratio.item()
        assert first[case] == pytest.approx([union, union]), case
