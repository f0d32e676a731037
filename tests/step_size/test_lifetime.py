"""EssLearningRate in the life of an optimizer: closures, removal, copies, ranks, and every error by message."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests import ranks
from tests.sequences.brute_force import ess_ratio
from tests.step_size.batches import HALF, NAN, QUARTER, fill_gradients, loss_of, parameters

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


def rank_steps(rank: int) -> list[tuple[float, float, int, float]]:
    """A step per case of RANKS on the whole group's ESS: ratio, weight, warnings and rate after it."""
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
    return results


def test_ranks_share_one_ess() -> None:
    """Two gloo ranks step by the ESS of the union, bitwise alike, or their parameters drift apart.

    A rank that observed nothing takes part; where no rank did, the rate is left alone and the step says so.
    """
    first, second = ranks.run(rank_steps, 2)
    assert first == second
    for (case, per_rank), (ratio, weight, warned, lr) in zip(RANKS.items(), first, strict=True):
        union = torch.cat([*per_rank[0], *per_rank[1], torch.zeros(0)])
        nobody = case == "nobody observes"
        assert ratio == pytest.approx(ess_ratio(union.tolist())[1]), case
        assert weight == pytest.approx(-1.0 if nobody else -math.sqrt(ratio)), case
        assert warned == nobody, case
        assert lr == 1.0, case


def test_what_was_refused_is_not_counted() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    weight.grad = torch.ones(1)
    rate.observe(QUARTER)
    with pytest.raises(ValueError, match="one number has no ESS"):
        rate.observe(torch.ones(()))
    optimizer.step()
    assert rate.ratio == 0.25


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
    "observe a loss": (
        lambda: vk.EssLearningRate(sgd()).observe(torch.zeros(())),
        ValueError,
        r"observe: output must be a VCPOOutput.* got a float32 tensor of shape \(\).*Pass the whole output",
    ),
    "observe a loss with a gradient": (
        lambda: vk.EssLearningRate(sgd()).observe(loss_of(parameters()[0], QUARTER).loss),
        ValueError,
        r"one number has no ESS\. Pass the whole output, not its loss, ess or ess_ratio: observe\(out\)",
    ),
    "observe an ESS ratio": (
        lambda: vk.EssLearningRate(sgd()).observe(vk.effective_sample_size(QUARTER).ratio.double()),
        ValueError,
        r"got a float64 tensor of shape \(\).*one number has no ESS",
    ),
    "observe an int 0-d": (
        lambda: vk.EssLearningRate(sgd()).observe(torch.tensor(3)),
        ValueError,
        r"got a int64 tensor of shape \(\).*one number has no ESS",
    ),
    "observe log-ratios of tokens": (
        lambda: vk.EssLearningRate(sgd()).observe(torch.zeros(4, 3)),
        ValueError,
        r"shape \(4, 3\).*summed over each sequence: sequence_log_weights\(stats\.logp, behavior_logp, segments\)",
    ),
    "observe losses": (
        lambda: vk.EssLearningRate(sgd()).observe(torch.zeros(4, requires_grad=True)),
        ValueError,
        r"that requires a gradient, as a loss does\. Pass the whole output.*If these are log-weights: \.detach\(\)",
    ),
    "observe half": (
        lambda: vk.EssLearningRate(sgd()).observe(QUARTER.bfloat16()),
        TypeError,
        r"output must be one of float32, float64, got a bfloat16 .*Of log-weights: \.float\(\)",
    ),
    "observe token statistics": (
        lambda: vk.EssLearningRate(sgd()).observe(vk.token_stats(torch.zeros(2, 3), torch.zeros(2).long())),
        TypeError,
        r"got TokenStats.*Token statistics are of tokens: pass what the loss made of them, or sequence_log_weights\(",
    ),
    "observe a number": (
        lambda: vk.EssLearningRate(sgd()).observe(0.5),
        TypeError,
        r"got 0\.5 \(float\)\. Pass what vcpo_loss or the objective returned: observe\(out\)",
    ),
    "observe None": (lambda: vk.EssLearningRate(sgd()).observe(None), TypeError, "got None"),
    "observe an array": (
        lambda: vk.EssLearningRate(sgd()).observe(QUARTER.numpy()),
        TypeError,
        r"ndarray.*Log-weights as a tensor: torch\.as_tensor\(log_weights\)",
    ),
    "observe several outputs": (
        lambda: vk.EssLearningRate(sgd()).observe([vk.effective_sample_size(QUARTER)]),
        TypeError,
        r"\(list\)\. Call observe once for each micro-batch's output",
    ),
    "observe broken moments": (
        lambda: vk.EssLearningRate(sgd()).observe(
            vk.EffectiveSampleSize(torch.ones(()), torch.ones(()), torch.ones(2).double())
        ),
        ValueError,
        r"output's ESS moments must have shape \(3,\).*got a float64 tensor of shape \(2,\)",
    ),
    "observe moments in another dtype": (
        lambda: vk.EssLearningRate(sgd()).observe(
            vk.EffectiveSampleSize(torch.ones(()), torch.ones(()), torch.ones(3))
        ),
        TypeError,
        "output's ESS moments must be one of float64, got a float32",
    ),
    "observe a loss that is a number": (
        lambda: vk.EssLearningRate(sgd()).observe(SimpleNamespace(loss=1.0, ess_moments=torch.ones(3).double())),
        TypeError,
        r"output\.loss must be a torch\.Tensor, got 1\.0",
    ),
    "observe int": (
        lambda: vk.EssLearningRate(sgd()).observe(torch.zeros(2).long()),
        TypeError,
        "observe: output must be one of float32, float64",
    ),
}


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case: str) -> None:
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=r"EssLearningRate.*" + message):
        call()
