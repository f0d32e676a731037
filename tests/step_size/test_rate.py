"""EssLearningRate: each step is one at the scaled rate, and the rate is back afterwards, whatever happened in between.

Closures, lifetime, ranks and errors are in test_step_size_lifetime.py.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.sequences.brute_force import ess_ratio
from tests.step_size.batches import HALF, INF, NAN, OPTIMIZERS, QUARTER, fill_gradients, loss_of, parameters

# --- the step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 0.5), ("linear", 0.25)])
def test_each_step_equals_one_by_hand_at_the_scaled_rate(name: str, rule: str, factor: float) -> None:
    """Bitwise, over several steps, for every code path of AdamW; the rate reads unscaled between them."""
    ours, theirs = parameters(), parameters()
    optimizer, by_hand = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    rate = vk.EssLearningRate(optimizer, rule=rule)
    for step in range(3):
        fill_gradients(ours, step)
        fill_gradients(theirs, step)
        observed = QUARTER if step != 1 else torch.zeros(4)
        rate.observe(observed)
        optimizer.step()
        scale = factor if step != 1 else 1.0
        lr = 0.1 * scale
        by_hand.param_groups[0]["lr"] = torch.tensor(lr) if "tensor lr" in name else lr
        by_hand.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1, rel=1e-7)
        assert rate.scale is not None
        assert rate.scale.item() == pytest.approx(scale)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_the_rate_is_restored_to_the_bit() -> None:
    """No drift over many steps: the rate is put back, not divided back."""
    params = parameters()
    for make in (OPTIMIZERS["AdamW"], OPTIMIZERS["AdamW tensor lr"]):
        optimizer = make(params)
        before = copy.deepcopy(optimizer.param_groups[0]["lr"])
        rate = vk.EssLearningRate(optimizer)
        generator = torch.Generator().manual_seed(0)
        for i in range(50):
            fill_gradients(params, i)
            rate.observe(torch.randn(5, generator=generator))
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == before


@pytest.mark.parametrize("shared", [True, False])
def test_groups_with_their_own_or_a_shared_tensor_rate(shared: bool) -> None:
    """Groups that share one lr tensor must not scale it once per group; each keeps its object (CUDA graphs
    hold on to it).
    """
    a, b = parameters()
    first = torch.tensor(1.0)
    second = first if shared else torch.tensor(3.0)
    optimizer = torch.optim.SGD([{"params": [a], "lr": first}, {"params": [b], "lr": second}], lr=1.0, foreach=False)
    rate = vk.EssLearningRate(optimizer)
    before = [p.detach().clone() for p in (a, b)]
    fill_gradients([a, b], 0)
    rate.observe(QUARTER)
    optimizer.step()
    for p, old, r in zip((a, b), before, (1.0, 1.0 if shared else 3.0), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), old - 0.5 * r * p.grad)
    assert all(g["lr"] is t for g, t in zip(optimizer.param_groups, (first, second), strict=True))
    assert (first.item(), second.item()) == (1.0, 1.0 if shared else 3.0)


def test_groups_with_a_float_and_a_tensor_rate() -> None:
    a, b = parameters()
    optimizer = torch.optim.SGD(
        [{"params": [a], "lr": torch.tensor(1.0)}, {"params": [b], "lr": 2.0}], lr=1.0, foreach=False
    )
    rate = vk.EssLearningRate(optimizer)
    before = b.detach().clone()
    fill_gradients([a, b], 0)
    rate.observe(QUARTER)
    optimizer.step()
    assert b.grad is not None
    torch.testing.assert_close(b.detach(), before - b.grad)
    assert [float(g["lr"]) for g in optimizer.param_groups] == [1.0, 2.0]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=8),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "Warmup then cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("scheduler_first", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_see_the_unscaled_rate(name: str, scheduler_first: bool, tensor_lr: bool) -> None:
    """Recursive schedulers multiply the current rate: a scaled one left behind would compound. Either may
    come first.
    """

    def run(scaled: bool) -> list[float]:
        params = parameters()
        optimizer = torch.optim.AdamW(params, lr=torch.tensor(0.1) if tensor_lr else 0.1, foreach=False)
        if scaled and not scheduler_first:
            rate = vk.EssLearningRate(optimizer)
        scheduler = SCHEDULERS[name](optimizer)
        if scaled and scheduler_first:
            rate = vk.EssLearningRate(optimizer)
        rates = []
        for i in range(7):
            fill_gradients(params, i)
            if scaled:
                rate.observe(QUARTER)
            optimizer.step()
            scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates

    assert run(scaled=True) == run(scaled=False)


# --- which ratio --------------------------------------------------------------------------------------------


def one_step(*observed: Any, **kwargs: Any) -> vk.EssLearningRate:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer, **kwargs)
    for o in observed:
        rate.observe(o)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert rate.scale is not None
    assert weight.item() == pytest.approx(-rate.scale.item())
    rate.remove()
    return rate


@pytest.mark.parametrize(
    ("rule", "reference", "expected"),
    [
        ("sqrt", 1.0, 0.5),
        ("linear", 1.0, 0.25),
        ("sqrt", 0.5, math.sqrt(0.5)),
        ("linear", 0.5, 0.5),
        ("linear", 0.1, 1.0),
        ("sqrt", 2, math.sqrt(1 / 8)),
    ],
)
def test_rules_and_reference(rule: str, reference: float, expected: float) -> None:
    """eta * min(1, rho / reference)^(1/2 or 1): never above eta."""
    rate = one_step(QUARTER, rule=rule, reference=reference)
    assert rate.scale is not None
    assert rate.scale.item() == pytest.approx(expected)


def test_micro_batches_merge_to_the_ess_of_the_union() -> None:
    """The mean of micro-batch ratios would be 0.625 here; the union's is what the step deserves."""
    parts = [torch.zeros(2), QUARTER + 3.0, torch.tensor([NAN, 1.0]), torch.zeros(0)]
    rate = one_step(*parts)
    assert rate.ratio is not None
    assert rate.ratio.item() == pytest.approx(ess_ratio(torch.cat(parts).tolist())[1])


def test_whatever_carries_an_ess_can_be_observed() -> None:
    """A VCPOOutput, an EffectiveSampleSize or bare log-weights: one ratio. Empty sequences stay out of it, as
    in the loss.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    same: list[Any] = [QUARTER, vk.effective_sample_size(QUARTER), loss_of(weight, QUARTER)]
    ratios = [one_step(o).ratio for o in same]
    assert [r.item() for r in ratios if r is not None] == pytest.approx([0.25] * 3)
    valid = torch.tensor([True, True, False, False])
    assert one_step(vk.effective_sample_size(QUARTER, valid)).ratio == 0.5


@pytest.mark.parametrize("broken", [[], [NAN], [INF, NAN], [-INF, -INF]], ids=str)
def test_a_batch_without_any_usable_sequence_takes_no_step(broken: list[float]) -> None:
    """The authors' min(1, NaN) is the full rate. Here nothing known means nothing done."""
    rate = one_step(torch.tensor(broken))
    assert (rate.ratio, rate.scale) == (0, 0)


def test_nan_sequences_can_only_shrink_the_step() -> None:
    healthy, broken = one_step(torch.zeros(3)), one_step(torch.tensor([0.0, 0.0, 0.0, NAN, INF]))
    assert healthy.scale is not None
    assert broken.scale is not None
    assert broken.scale.item() == pytest.approx(math.sqrt(3 / 5))
    assert broken.scale < healthy.scale


@pytest.mark.parametrize("moments", [[NAN] * 3, [0.0, NAN, 4.0], [INF, INF, 4.0]], ids=str)
def test_a_nan_that_reaches_the_moments_takes_no_step(moments: list[float]) -> None:
    """Moments merged by other code may hold NaN, which clamp(max=1) would let through to the parameters."""
    broken = vk.EffectiveSampleSize(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(moments).double())
    rate = one_step(broken)
    assert rate.scale == 0


def test_a_window_ends_with_its_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    weight.grad = torch.ones(1)
    for observed, expected in ((QUARTER, 0.25), (HALF, 0.5), (torch.zeros(3), 1.0)):
        rate.observe(observed)
        optimizer.step()
        assert rate.ratio == expected


# --- steps that do not happen -------------------------------------------------------------------------------


def test_step_without_observe_warns_once_and_keeps_the_rate() -> None:
    """A forgotten observe() is a plain step, said once, where the caller's step() is."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    vk.EssLearningRate(optimizer)
    weight.grad = torch.ones(1)
    with pytest.warns(UserWarning, match=r"optimizer\.step\(\) without an observe\(\)") as caught:
        optimizer.step()
    assert weight.item() == -1.0
    assert Path(caught[0].filename).name == Path(__file__).name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


ORDERS = {
    "zero_grad, observe, backward": ("zero_grad", "observe", "backward"),
    "observe, zero_grad, backward": ("observe", "zero_grad", "backward"),
    "zero_grad, backward, observe": ("zero_grad", "backward", "observe"),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_a_step_that_the_grad_scaler_skips_leaves_nothing_behind(order: str, fused: bool) -> None:
    """GradScaler does not call step() on inf gradients, so the window stays; zero_grad() forgets it with the
    gradients.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rate = vk.EssLearningRate(optimizer)

    def one(log_weights: Tensor, overflow: bool) -> None:
        out = loss_of(weight, log_weights)
        for action in ORDERS[order]:
            if action == "zero_grad":
                optimizer.zero_grad()
            elif action == "observe":
                rate.observe(out)
            else:
                scaler.scale(out.loss).backward()
                assert weight.grad is not None
                if overflow:
                    weight.grad.fill_(INF)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.param_groups[0]["lr"] == 1.0

    one(torch.zeros(2), overflow=False)
    before = weight.item()
    one(QUARTER, overflow=True)
    assert weight.item() == before
    one(torch.zeros(2), overflow=False)
    assert rate.ratio == 1  # not the 1/2 of both batches together
    assert weight.item() != before


def test_accumulated_micro_batches_survive_zero_grad_before_their_backward() -> None:
    """Only what has been backpropagated goes with the gradients."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    first, second = loss_of(weight, QUARTER), loss_of(weight, HALF)
    rate.observe(first)
    rate.observe(second)
    optimizer.zero_grad()
    (first.loss + second.loss).backward()
    optimizer.step()
    assert rate.ratio == pytest.approx(2 / 6)


def test_log_weights_of_a_skipped_step_need_a_reset() -> None:
    """zero_grad() keeps them until a gradient arrives that is not theirs (observe may come first), reset() forgets
    them.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    weight.grad = torch.ones(1)
    rate.observe(QUARTER)
    optimizer.zero_grad()
    rate.observe(HALF)
    optimizer.step()
    assert rate.ratio == pytest.approx(2 / 6)
    rate.observe(QUARTER)
    rate.reset()
    rate.observe(HALF)
    optimizer.step()
    assert rate.ratio == 0.5


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_an_optimizer_that_extends_the_step_of_another_is_scaled_once(tensor_lr: bool) -> None:
    """torch runs the step hooks for the override and again for super().step(): the inner run must keep the
    outer's scale.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = Failing([weight], lr=torch.tensor(1.0) if tensor_lr else 1.0, foreach=False)
    optimizer.fail = False
    rate = vk.EssLearningRate(optimizer)
    weight.grad = torch.ones(1)
    for expected in (-0.5, -1.0):
        rate.observe(QUARTER)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert weight.item() == expected
        assert float(optimizer.param_groups[0]["lr"]) == 1.0


class Failing(torch.optim.SGD):
    """Fails in its step while `fail` is set, after the rate was scaled."""

    fail = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.fail:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("recover", ["reset", "next step", "the same step again", "remove"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_step_that_raises_can_be_recovered_from(recover: str, tensor_lr: bool) -> None:
    """torch calls no post hook then. The true rate is back at the next step, reset() or remove(), and is not
    scaled twice.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = Failing([weight], lr=torch.tensor(1.0) if tensor_lr else 1.0, foreach=False)
    rate = vk.EssLearningRate(optimizer)
    weight.grad = torch.ones(1)
    rate.observe(QUARTER)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fail = False
    if recover in ("next step", "the same step again"):
        if recover == "next step":
            rate.observe(torch.tensor([0.0] + [-1e4] * 15))
        optimizer.step()
        assert weight.item() == (-0.25 if recover == "next step" else -0.5)
    else:
        rate.reset() if recover == "reset" else rate.remove()
    assert float(optimizer.param_groups[0]["lr"]) == 1.0


def test_numpy_reference() -> None:
    np = pytest.importorskip("numpy")
    rate = one_step(QUARTER, reference=np.float32(0.25))
    assert rate.scale == 1
