"""EssLearningRate: each step is one at the scaled rate, and the rate is back afterwards, whatever happened in
between.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.brute_force import ess_ratio

NAN, INF = math.nan, math.inf

# ESS 1 of 4: rho = 1/4, and the sqrt rule's factor is exactly 1/2. ESS 1 of 2.
QUARTER = torch.tensor([0.0, -1e4, -1e4, -1e4])
HALF = torch.tensor([0.0, -1e4])

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **kw: torch.optim.SGD(p, lr=0.1, **kw),
    "SGD momentum": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, **kw),
    "AdamW": lambda p, **kw: torch.optim.AdamW(p, lr=0.1, **kw),
    "AdamW foreach": lambda p, **kw: torch.optim.AdamW(p, lr=0.1, foreach=True, **kw),
    "AdamW fused": lambda p, **kw: torch.optim.AdamW(p, lr=0.1, fused=True, **kw),
    "AdamW tensor lr": lambda p, **kw: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False, **kw),
    "AdamW fused tensor lr": lambda p, **kw: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True, **kw),
    "RMSprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.1, **kw),
}


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]


def fill_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def loss_of(weight: Tensor, log_weights: Tensor) -> vk.VCPOOutput:
    """A VCPOOutput with a gradient to `weight`, whose sequences, of one token each, have the given L_i."""
    n = log_weights.numel()
    logits = weight.sum() * torch.ones(n, 1, 1) * torch.tensor([1.0, 0.0])
    stats = vk.token_stats(logits, torch.arange(n)[:, None] % 2)
    mu = stats.logp.detach() - log_weights[:, None]
    return vk.vcpo_loss(stats, mu, torch.arange(float(n)), n, vk.Segments.padded(torch.ones(n, 1)))


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
    """They have no loss to watch: zero_grad() keeps them (observe may come first), reset() forgets them. As
    documented.
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


# --- closures -----------------------------------------------------------------------------------------------


def test_a_closure_after_an_observed_forward() -> None:
    """step(closure) works as any step does when the batch was observed before it."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)

    def closure() -> float:
        weight.grad = torch.ones(1)
        return 0.0

    rate.observe(QUARTER)
    optimizer.step(closure)
    assert weight.item() == -0.5


@pytest.mark.parametrize("lbfgs", [False, True])
def test_observing_inside_the_closure_is_too_late_and_leaks_nowhere(lbfgs: bool) -> None:
    """The rate was set before the closure ran. That step is a full one and says so; the next must not use the
    old batch's ESS.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.LBFGS([weight], lr=1.0, max_iter=3) if lbfgs else torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        rate.observe(QUARTER)
        loss = (weight - 1).square().sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="not inside its closure"):
        optimizer.step(closure)
    rate.observe(HALF)
    optimizer.step(closure)
    assert rate.ratio == 0.5
    assert optimizer.param_groups[0]["lr"] == 1.0


# --- lifetime -----------------------------------------------------------------------------------------------


def test_remove_leaves_the_optimizer_as_it_was() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    attributes = set(vars(optimizer))
    rate = vk.EssLearningRate(optimizer)
    rate.observe(QUARTER)
    rate.remove()
    rate.remove()  # twice is once
    assert set(vars(optimizer)) == attributes
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == -1.0
    vk.EssLearningRate(optimizer)  # and another may take its place


def test_two_on_one_optimizer_are_refused() -> None:
    """Both would scale, and the second to restore would put the first one's scaled rate back: the rate would
    decay for good.
    """
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    vk.EssLearningRate(optimizer)
    with pytest.raises(ValueError, match=r"has an EssLearningRate already\. Call remove\(\) on that one first"):
        vk.EssLearningRate(optimizer)


def test_dropping_the_reference_does_not_stop_it_and_the_optimizer_frees_it() -> None:
    """The optimizer's hooks own it: it acts until remove(), and dies with the optimizer."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    rate.observe(QUARTER)
    alive = weakref.ref(rate)
    del rate
    gc.collect()
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == -0.5
    del optimizer
    gc.collect()
    assert alive() is None


def test_observations_do_not_keep_graphs_alive() -> None:
    """A window holds moments, not losses: activations are freed with the caller's last reference."""
    weight = torch.nn.Parameter(torch.zeros(1))
    rate = vk.EssLearningRate(torch.optim.SGD([weight], lr=1.0))
    out = loss_of(weight, QUARTER)
    rate.observe(out)
    loss = weakref.ref(out.loss)
    del out
    gc.collect()
    assert loss() is None


def test_the_optimizer_still_copies_pickles_and_saves() -> None:
    """Checkpoints hold the unscaled rate, and copies are free of hooks."""
    optimizer = torch.optim.AdamW(parameters(), lr=0.1)
    rate = vk.EssLearningRate(optimizer)
    rate.observe(QUARTER)
    fill_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.param_groups[0]["lr"] == 0.1
        other.zero_grad()
        other.step()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1


def test_zero_grad_keeps_its_arguments() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=1.0)
    vk.EssLearningRate(optimizer)
    fill_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert [p.grad is not None and not p.grad.any() for p in params] == [True, True]
    optimizer.zero_grad()
    assert [p.grad for p in params] == [None, None]


# --- ranks --------------------------------------------------------------------------------------------------

RANKS = {
    "both observe": ([torch.zeros(2), QUARTER + 2.0], [HALF, torch.tensor([NAN])]),
    "one observes nothing": ([QUARTER, HALF], []),
    "nobody observes": ([], []),
    "empty batches": ([torch.zeros(0)], []),
}


def rank_steps(rank: int, folder: str) -> None:
    """One process: a step per case of RANKS on the whole group's ESS; writes what it saw."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for per_rank in RANKS.values():
        weight = torch.nn.Parameter(torch.zeros(1))
        # The other rank's optimizer may have no parameters in its first group (FSDP shards unevenly).
        optimizer = torch.optim.SGD([{"params": []}, {"params": [weight]}], lr=1.0)
        rate = vk.EssLearningRate(optimizer, process_group=torch.distributed.group.WORLD)
        for observed in per_rank[rank]:
            rate.observe(observed)
        weight.grad = torch.ones(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert rate.ratio is not None
        results.append((rate.ratio.item(), weight.item(), len(caught), optimizer.param_groups[1]["lr"]))
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_share_one_ess(tmp_path: Path) -> None:
    """Two gloo ranks step by the ESS of the union, bitwise alike, or their parameters drift apart.

    A rank that observed nothing takes part; where no rank did, the rate is left alone and the step says so.
    """
    torch.multiprocessing.spawn(rank_steps, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(2))
    assert first == second
    for (case, per_rank), (ratio, weight, warned, lr) in zip(RANKS.items(), first, strict=True):
        union = torch.cat([*per_rank[0], *per_rank[1], torch.zeros(0)])
        nobody = case == "nobody observes"
        assert ratio == pytest.approx(ess_ratio(union.tolist())[1]), case
        assert weight == pytest.approx(-1.0 if nobody else -math.sqrt(ratio)), case
        assert warned == nobody, case
        assert lr == 1.0, case


# --- errors -------------------------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """What accelerate hands out: an Optimizer by type that forwards to another and never ran
    Optimizer.__init__.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters(), lr=1.0)


def without_rate() -> torch.optim.Optimizer:
    optimizer = sgd()
    optimizer.param_groups[0]["lr"] = None  # transformers' Adafactor
    return optimizer


BAD_INPUT = {
    "optimizer": (
        lambda: vk.EssLearningRate(parameters()),
        TypeError,
        r"optimizer must be a torch\.optim\.Optimizer, got list",
    ),
    "wrapper": (
        lambda: vk.EssLearningRate(Wrapper(sgd())),
        TypeError,
        r"is a Wrapper that wraps another.*Pass the inner optimizer",
    ),
    "no rate": (
        lambda: vk.EssLearningRate(without_rate()),
        TypeError,
        r"param_groups\[0\]\['lr'\] must be a number or a tensor, got None",
    ),
    "rule": (
        lambda: vk.EssLearningRate(sgd(), rule="cube"),
        ValueError,
        "rule must be one of 'sqrt', 'linear', got 'cube'",
    ),
    "reference zero": (
        lambda: vk.EssLearningRate(sgd(), reference=0),
        ValueError,
        "reference must be finite and > 0, got 0",
    ),
    "reference NaN": (
        lambda: vk.EssLearningRate(sgd(), reference=NAN),
        ValueError,
        "reference must be finite",
    ),
    "reference str": (
        lambda: vk.EssLearningRate(sgd(), reference="1"),
        TypeError,
        "reference must be a float > 0, got '1'",
    ),
    "observe loss dict": (
        lambda: vk.EssLearningRate(sgd()).observe({"loss": 1}),
        TypeError,
        r"observe: output must be a VCPOOutput, an EffectiveSampleSize or log-weights.* got \{.loss.: 1\}",
    ),
    "observe int": (
        lambda: vk.EssLearningRate(sgd()).observe(torch.zeros(2).long()),
        TypeError,
        "observe: output must be one of float32, float64",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=r"EssLearningRate.*" + message):
        call()


def test_numpy_reference() -> None:
    np = pytest.importorskip("numpy")
    rate = one_step(QUARTER, reference=np.float32(0.25))
    assert rate.scale == 1
