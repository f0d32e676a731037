"""EssLearningRate beside others: who set rates, add groups and wrap methods during a step, and optimizers of every make."""

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
from torch.optim.optimizer import register_optimizer_step_post_hook

import vcpo_kernels as vk
from tests.step_size_batches import QUARTER, fill_gradients, parameters

# --- rates that others set during a step ------------------------------------------------------------------------------


class Plain(torch.optim.SGD):
    """SGD with something to do before and after its step, inside of it."""

    before: Callable[[], None] = staticmethod(lambda: None)
    after: Callable[[], None] = staticmethod(lambda: None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.before()
        result = super().step(closure)
        self.after()
        return result


def lr_of(tensor: bool, value: float = 1.0) -> Any:
    return torch.tensor(value) if tensor else value


def value(rate: Any) -> float:
    return float(rate)


def put(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """As a scheduler does: into the tensor where there is one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
def test_a_copy_clears_its_own_gradients(make: Any) -> None:
    params = parameters()
    optimizer = make(params, lr=1.0)
    vk.EssLearningRate(optimizer)
    fill_gradients(params, 0)
    other = copy.deepcopy(optimizer)
    mine = other.param_groups[0]["params"]
    fill_gradients(mine, 1)
    other.zero_grad()
    assert [p.grad for p in mine] == [None, None]
    assert all(p.grad is not None for p in params)
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
