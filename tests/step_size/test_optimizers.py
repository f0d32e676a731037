"""EssLearningRate on optimizers of every make, as their methods were, compiled, copied and saved."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.step_size.batches import QUARTER, Plain, fill_gradients, parameters, put, value

# --- methods that are replaced ----------------------------------------------------------------------------------------


class Whole(torch.optim.SGD):
    """Saves all of itself, as some optimizers do."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


class Louder(torch.optim.SGD):
    """A zero_grad with a signature and a result of its own."""

    def zero_grad(self, set_to_none: bool = True, *, loud: int = 3) -> str:  # type: ignore[override]
        super().zero_grad(set_to_none)
        return "cleared" * loud


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, Whole, Louder])
def test_zero_grad_is_the_method_it_was(make: Any) -> None:
    """Its signature, name, result and owner: accelerate asks for its parameters."""
    plain, optimizer = make(parameters(), lr=1.0), make(parameters(), lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    assert inspect.signature(optimizer.zero_grad) == inspect.signature(plain.zero_grad)
    assert (optimizer.zero_grad.__name__, optimizer.zero_grad.__self__) == ("zero_grad", optimizer)
    assert optimizer.zero_grad.__doc__ == plain.zero_grad.__doc__
    assert optimizer.zero_grad() == plain.zero_grad()
    rate.remove()
    assert "zero_grad" not in vars(optimizer)
    assert optimizer.zero_grad == type(optimizer).zero_grad.__get__(optimizer)


def test_zero_grad_that_somebody_else_replaced_before() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=1.0)
    calls = []

    def theirs(set_to_none: bool = False, verbose: bool = True) -> None:
        calls.append((set_to_none, verbose))

    optimizer.zero_grad = theirs  # type: ignore[method-assign]
    rate = vk.EssLearningRate(optimizer)
    assert inspect.signature(optimizer.zero_grad) == inspect.signature(theirs)
    optimizer.zero_grad(verbose=False)
    assert calls == [(False, False)]
    rate.remove()
    assert optimizer.zero_grad is theirs


@pytest.mark.parametrize("make", [torch.optim.SGD, Whole])
def test_a_copy_clears_and_takes_its_own_gradients(make: Any) -> None:
    params = parameters()
    optimizer = make(params, lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    rate.observe(QUARTER)
    fill_gradients(params, 0)
    other = copy.deepcopy(optimizer)
    mine = other.param_groups[0]["params"]
    fill_gradients(mine, 1)
    other.zero_grad()
    assert [p.grad for p in mine] == [None, None]
    fill_gradients(mine, 1)
    other.step()
    assert all(p.grad is not None for p in params)
    assert rate.ratio is None
    optimizer.step()
    assert rate.ratio == 0.25
    if make is torch.optim.SGD:
        pickle.loads(pickle.dumps(optimizer)).zero_grad()


def test_parameters_are_saved_and_copied_without_hooks() -> None:
    """A plain tensor with a hook warns when it is pickled, unless the hook says that it need not be."""
    tensor = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([tensor, *parameters()], lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in optimizer.param_groups[0]["params"]:
            assert not getattr(pickle.loads(pickle.dumps(p)), "_post_accumulate_grad_hooks", None)
            assert not getattr(copy.deepcopy(p), "_post_accumulate_grad_hooks", None)
    rate.remove()
    assert not any(p._post_accumulate_grad_hooks for p in optimizer.param_groups[0]["params"])


def test_a_compiled_step() -> None:
    """Hooks look at what no graph can hold; the loop around the step may be compiled with it."""
    ours, theirs = parameters(), parameters()
    optimizer = torch.optim.AdamW(ours, lr=torch.tensor(0.1), foreach=False)
    by_hand = torch.optim.AdamW(theirs, lr=0.1)
    rate = vk.EssLearningRate(optimizer)

    def step(observed: Tensor) -> None:
        rate.observe(observed)
        optimizer.step()
        optimizer.zero_grad()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    for i in range(4):
        fill_gradients(ours, i)
        fill_gradients(theirs, i)
        compiled(QUARTER if i % 2 else torch.zeros(4))
        put(by_hand, 0.05 if i % 2 else 0.1)
        by_hand.step()
        assert optimizer.param_groups[0]["lr"] == torch.tensor(0.1)
        assert [p.grad for p in ours] == [None, None]
    torch.testing.assert_close(ours, theirs)


def test_compiled_models_keep_one_graph() -> None:
    model = torch.nn.Linear(2, 1)
    vk.EssLearningRate(torch.optim.SGD(model.parameters(), lr=1.0))
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


# --- optimizers -------------------------------------------------------------------------------------------------------


def rows(grad: Tensor) -> Tensor:
    return grad.to_sparse(1)


MAKERS: dict[str, Callable[[list[Any], Any], torch.optim.Optimizer]] = {
    "SparseAdam": lambda p, lr: torch.optim.SparseAdam(p, lr=lr),
    "Adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
    "AdamW foreach amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True, amsgrad=True),
    "AdamW fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "AdamW capturable": lambda p, lr: torch.optim.AdamW(p, lr=torch.tensor(lr), foreach=False),
    "SGD fused": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, fused=True),
    "an override": lambda p, lr: Plain(p, lr=lr),
    "a composite": lambda p, lr: Composite(p, lr),
}


class Composite(torch.optim.Optimizer):
    """One optimizer over the groups of two others, whose steps it calls."""

    def __init__(self, params: list[Any], lr: float) -> None:
        self.parts = [torch.optim.SGD(params[:1], lr=lr), torch.optim.AdamW(params[1:], lr=lr)]
        super().__init__(params, {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


@pytest.mark.parametrize("name", MAKERS)
def test_optimizers_step_as_by_hand_at_the_scaled_rate(name: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, by_hand = MAKERS[name](ours, 0.1), MAKERS[name](theirs, 0.1)
    rate = vk.EssLearningRate(optimizer)
    for step in range(4):
        for params in (ours, theirs):
            fill_gradients(params, step)
            if name == "SparseAdam":
                for p in params:
                    p.grad = rows(p.grad)
        scale = 0.5 if step % 2 else 1.0
        rate.observe(QUARTER if step % 2 else torch.zeros(4))
        optimizer.step()
        put(by_hand, 0.1 * scale)
        by_hand.step()
        assert value(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1, rel=1e-7)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("clear", ["zero_grad", "None"])
def test_sparse_gradients_of_a_skipped_step(clear: str) -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    rate = vk.EssLearningRate(optimizer)
    for observed, skipped in ((QUARTER, True), (torch.zeros(4), False)):
        rate.observe(observed)
        for _ in range(2):
            embedding(torch.tensor([0, 1])).sum().backward()
        if not skipped:
            optimizer.step()
        if clear == "zero_grad":
            optimizer.zero_grad()
        else:
            embedding.weight.grad = None
    assert rate.ratio == 1


def test_averaged_and_ema_models() -> None:
    """swa_utils copies the model and its parameters, and SWALR sets rates between steps."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.1, anneal_epochs=2, anneal_strategy="linear")
    rates = []
    for _ in range(3):
        rate.observe(QUARTER)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.55, 0.1, 0.1])
    assert not any(p._post_accumulate_grad_hooks for p in averaged.parameters())


def test_relative_steps_are_refused() -> None:
    """transformers' Adafactor then makes its rate itself; after its first step it stands in the group as if it were used."""
    optimization = pytest.importorskip("transformers.optimization", reason="pip install transformers")
    params = parameters()
    optimizer = optimization.Adafactor(params, relative_step=True)
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\] must be a number or a tensor, got None"):
        vk.EssLearningRate(optimizer)
    fill_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(
        ValueError, match=r"relative_step=True: Adafactor .* ignores 'lr'\. Build it with relative_step=False"
    ):
        vk.EssLearningRate(optimizer)


@pytest.mark.parametrize(
    ("make", "why"), [(torch.optim.Rprop, "first step alone"), (torch.optim.ASGD, "one step late")]
)
def test_optimizers_that_do_not_step_at_their_rate_are_named(make: Any, why: str) -> None:
    with pytest.warns(UserWarning, match=f"EssLearningRate: {make.__name__} .*{why}") as caught:
        vk.EssLearningRate(make(parameters(), lr=0.1))
    assert caught[0].filename == __file__
