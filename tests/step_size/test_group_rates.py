"""EssLearningRate beside others who set rates, add groups and replace tensors during a step: what they set stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import vcpo_kernels as vk
from tests.step_size.batches import QUARTER, Plain, fill_gradients, lr_of, put, value

# --- rates that others set during a step ------------------------------------------------------------------------------


WHERE = [
    "post hook",
    "earlier post hook",
    "global post hook",
    "pre hook",
    "earlier pre hook",
    "before",
    "after",
    "closure",
]


@pytest.mark.parametrize("new", [0.25, 0.5])  # 1/2 is what the scaled rate happens to be
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_a_rate_set_during_a_step_stays(where: str, tensor: bool, new: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    kind = Plain if where in ("before", "after") else torch.optim.SGD  # every hook of an override's step runs twice
    optimizer = kind([weight], lr=lr_of(tensor), foreach=False)

    def act(*_: Any) -> None:
        put(optimizer, new)

    handles = []
    if where.startswith("earlier"):
        handles.append((optimizer.register_step_pre_hook if "pre" in where else optimizer.register_step_post_hook)(act))
    rate = vk.EssLearningRate(optimizer)
    if where == "post hook":
        optimizer.register_step_post_hook(act)
    elif where == "global post hook":
        handles.append(register_optimizer_step_post_hook(act))
    elif where == "pre hook":
        optimizer.register_step_pre_hook(act)
    elif where in ("before", "after"):
        setattr(optimizer, where, act)
    weight.grad = torch.ones(1)
    rate.observe(QUARTER)
    try:
        optimizer.step(act if where == "closure" else None)
    finally:
        for handle in handles:
            handle.remove()
    assert value(optimizer.param_groups[0]["lr"]) == new
    # What is set before the rate is scaled, and in a closure, is scaled; what is set after the update is not in it.
    used = {"earlier pre hook": new / 2, "closure": new / 2, "pre hook": new, "before": new}.get(where, 0.5)
    assert weight.item() == -used


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("where", ["post hook", "earlier post hook", "closure", "after super().step()"])
def test_a_scheduler_that_multiplies_during_a_step(where: str, tensor: bool) -> None:
    """It must find the unscaled rate, or a schedule decays by ESS."""
    weight = torch.nn.Parameter(torch.zeros(1))
    torch.optim.SGD([weight])  # the hooks of super().step() exist from the first SGD on
    kind = Plain if where == "after super().step()" else torch.optim.SGD  # every hook of an override's step runs twice
    optimizer = kind([weight], lr=lr_of(tensor), foreach=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def act(*_: Any) -> None:
        scheduler.step()

    if where == "earlier post hook":
        optimizer.register_step_post_hook(act)
    rate = vk.EssLearningRate(optimizer)
    if where == "post hook":
        optimizer.register_step_post_hook(act)
    if where == "after super().step()":
        optimizer.after = act  # type: ignore[union-attr]
    for _ in range(3):
        weight.grad = torch.ones(1)
        rate.observe(QUARTER)
        optimizer.step(act if where == "closure" else None)
    assert value(optimizer.param_groups[0]["lr"]) == 0.125
    steps = (0.5, 0.25, 0.125) if where == "closure" else (1.0, 0.5, 0.25)
    assert weight.item() == -sum(steps) / 2


def test_a_closure_runs_as_often_as_ever_at_the_unscaled_rate() -> None:
    """LBFGS calls it many times; passed by name or by position it returns what it did."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.LBFGS([weight], lr=1.0, max_iter=4, tolerance_grad=0.0, tolerance_change=0.0)
    by_hand_weight = torch.nn.Parameter(torch.zeros(1))
    by_hand = torch.optim.LBFGS([by_hand_weight], lr=0.5, max_iter=4, tolerance_grad=0.0, tolerance_change=0.0)
    rate, found = vk.EssLearningRate(optimizer), []

    def closure_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            loss = (weight - 1).square().sum()
            loss.backward()
            return loss

        return closure

    for keyword in (False, True):
        rate.observe(QUARTER)
        closure = closure_of(optimizer, weight)
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert torch.equal(loss, by_hand.step(closure_of(by_hand, by_hand_weight)))
    assert torch.equal(weight, by_hand_weight)
    assert found.count(1.0) == found.count(0.5) > 4


def test_a_closure_that_raises_leaves_the_rate_unscaled() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    weight.grad = torch.ones(1)

    def fails() -> float:
        raise RuntimeError("out of memory")

    rate.observe(QUARTER)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    assert optimizer.param_groups[0]["lr"] == 1.0
    optimizer.step(lambda: 0.0)  # the same step, tried again
    assert (weight.item(), optimizer.param_groups[0]["lr"]) == (-0.5, 1.0)


# --- groups that come and go, tensors that are replaced ---------------------------------------------------------------


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("what", ["added", "first removed", "reversed", "loaded"])
def test_groups_that_come_and_go_during_a_step(what: str, tensor: bool) -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": [a], "lr": lr_of(tensor, 1.0)}, {"params": [b], "lr": lr_of(tensor, 2.0)}]
    optimizer = Plain(groups, lr=1.0, foreach=False)
    first, second = optimizer.param_groups
    saved = copy.deepcopy(optimizer.state_dict())

    def act() -> None:
        if what == "added":
            optimizer.add_param_group({"params": [c], "lr": lr_of(tensor, 4.0)})
        elif what == "first removed":
            del optimizer.param_groups[0]
        elif what == "reversed":
            optimizer.param_groups.reverse()
        else:
            optimizer.load_state_dict(saved)

    optimizer.after = act
    rate = vk.EssLearningRate(optimizer)
    fill_gradients([a, b], 0)
    rate.observe(QUARTER)
    optimizer.step()
    assert (value(first["lr"]), value(second["lr"])) == (1.0, 2.0)
    want = {"added": [1.0, 2.0, 4.0], "first removed": [2.0], "reversed": [2.0, 1.0], "loaded": [1.0, 2.0]}[what]
    assert [value(g["lr"]) for g in optimizer.param_groups] == want


def test_a_tensor_rate_replaced_during_a_step() -> None:
    """The new object stays, and the old one, which others may hold, has its value back."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = Plain([weight], lr=torch.tensor(1.0), foreach=False)
    old, new = optimizer.param_groups[0]["lr"], torch.tensor(0.125)
    optimizer.after = lambda: optimizer.param_groups[0].update(lr=new)
    rate = vk.EssLearningRate(optimizer)
    weight.grad = torch.ones(1)
    rate.observe(QUARTER)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is new
    assert (old.item(), new.item()) == (1.0, 0.125)


@pytest.mark.parametrize("number", [1.0, 0.5])
def test_a_tensor_rate_becomes_a_number_and_back(number: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = Plain([weight], lr=torch.tensor(1.0), foreach=False)
    rate = vk.EssLearningRate(optimizer)
    for new in (number, torch.tensor(number)):
        optimizer.after = lambda new=new: optimizer.param_groups[0].update(lr=new)
        weight.grad = torch.ones(1)
        rate.observe(QUARTER)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] is new
        assert value(new) == number
