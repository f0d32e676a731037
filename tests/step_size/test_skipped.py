"""A step that was skipped leaves nothing to the next, in every form of the loop that the pages show."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.step_size.batches import HALF, INF, QUARTER
from vcpo_kernels import objectives

IDS = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 2, 2]])
MASK = torch.ones(4, 3)
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0])
SEGMENTS = vk.Segments.padded(MASK)
ALL = torch.zeros(4)  # ESS 4 of 4


def new_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 3))


def behavior(logp: Tensor, log_weights: Tensor) -> Tensor:
    """log mu [4, 3] by which the sequences have the given L_i, with logp [4, 3]."""
    mu = logp.detach().clone()
    mu[:, 1] -= log_weights
    return mu


# A form of the loop: model, log-weights -> generator that yields what is observed where the output is there, and again, or for
# the first time, after its backwards.
Form = Callable[[Any, Tensor], Iterator[Any]]


def plain(model: Any, log_weights: Tensor, of: Callable[[vk.VCPOOutput], Any] = lambda out: out) -> Iterator[Any]:
    stats = vk.token_stats(model(IDS), IDS, MASK, shift=True)
    out = vk.vcpo_loss(stats, behavior(stats.logp, log_weights), REWARDS, 4, SEGMENTS)
    yield of(out)
    out.loss.backward()
    yield of(out)


def log_weights_alone(model: Any, log_weights: Tensor) -> Iterator[Any]:
    return plain(model, log_weights, lambda out: out.log_weights)


def ess_alone(model: Any, log_weights: Tensor) -> Iterator[Any]:
    return plain(model, log_weights, lambda out: vk.effective_sample_size(out.log_weights))


def scaled_loss(model: Any, log_weights: Tensor) -> Iterator[Any]:
    """What is backpropagated is made of the loss observed, which reaches no parameter of its own before."""
    stats = vk.token_stats(model(IDS), IDS, MASK, shift=True)
    out = vk.vcpo_loss(stats, behavior(stats.logp, log_weights), REWARDS, 4, SEGMENTS)
    yield out
    (out.loss * 2 - 0.01 * stats.entropy.mean()).backward()
    yield out


def two_phases(model: Any, log_weights: Tensor) -> Iterator[Any]:
    with torch.no_grad():
        stats = vk.token_stats(model(IDS), IDS, MASK, shift=True)
    out = vk.vcpo_loss(stats, behavior(stats.logp, log_weights), REWARDS, 4, SEGMENTS)
    coefficients = SEGMENTS.spread(-out.coefficients)
    yield out
    for rows in torch.arange(4).split(2):
        loss, _ = vk.weighted_logp(model(IDS[rows]), IDS[rows], coefficients[rows], MASK[rows], shift=True)
        loss.backward()
    yield out


def objective(model: Any, log_weights: Tensor) -> Iterator[Any]:
    stats = vk.token_stats(model(IDS), IDS, MASK, shift=True)
    out = objectives.gspo(stats, behavior(stats.logp, log_weights), REWARDS - 0.5, SEGMENTS)
    yield out
    out.loss.backward()
    yield out


def by_sequence(model: Any, log_weights: Tensor) -> Iterator[Any]:
    with vk.SequenceGradients(model) as grads:
        stats = vk.token_stats(model(IDS), IDS, MASK, shift=True)
        grads.backward(SEGMENTS.sum(stats.logp), SEGMENTS)
        config = vk.VCPOConfig(score_norm=grads.squared_norms())
        out = vk.vcpo_loss(stats, behavior(stats.logp, log_weights), REWARDS, 4, SEGMENTS, config)
        yield out
        grads.accumulate_(out.coefficients)
    yield out


def opob(model: Any, log_weights: Tensor) -> Iterator[Any]:
    """Its output is there after the backwards."""
    accumulator = vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(num_sequences=4))
    accumulator.start_group(REWARDS)
    for i in range(4):
        row = slice(i, i + 1)
        stats = vk.token_stats(model(IDS[row]), IDS[row], MASK[row], shift=True)
        accumulator.backward(stats, behavior(stats.logp, log_weights[row]), vk.Segments.padded(MASK[row]))
    accumulator.finish_group()
    yield None
    yield accumulator.output()


FORMS: dict[str, Form] = {
    "vcpo_loss": plain,
    "log-weights": log_weights_alone,
    "effective_sample_size": ess_alone,
    "a loss made of the output's": scaled_loss,
    "two phases": two_phases,
    "objective": objective,
    "SequenceGradients": by_sequence,
    "OPOBAccumulator": opob,
}
CLEARS: dict[str, Callable[[Any, torch.optim.Optimizer], None]] = {
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "zero_grad to zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
}


class Loop:
    """One loop: a form, whether it observes ahead of its backwards, and where and how it clears gradients."""

    def __init__(self, form: str, observes: str, clears_at: str, clear: str, skip: str = "by hand") -> None:
        self.form, self.observes, self.clears_at, self.skip = FORMS[form], observes, clears_at, skip
        self.model = new_model()
        fused = skip == "GradScaler, fused"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=fused)
        self.rate = vk.EssLearningRate(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        self._clear = CLEARS[clear]

    def clear(self) -> None:
        self._clear(self.model, self.optimizer)

    def step(self, *micro_batches: Tensor, skipped: bool = False) -> Tensor | None:
        """One pass: the ratio of its step."""
        for i, log_weights in enumerate(micro_batches):
            if i == 0 and self.clears_at == "start":
                self.clear()
            before, after = (found for found in self._run(log_weights, clear=i == 0 and self.clears_at == "middle"))
            assert (before is None) != (after is None)
        if self.skip == "by hand":
            if not skipped:
                self.optimizer.step()
        else:
            if skipped:
                next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(INF)
            self.scaler.scale(torch.zeros(()))  # it scales by 1 here
            self.scaler.step(self.optimizer)
            self.scaler.update(1.0)
        if self.clears_at == "end":
            self.clear()
        return self.rate.ratio

    def _run(self, log_weights: Tensor, clear: bool) -> Iterator[Any]:
        stages = self.form(self.model, log_weights)
        out = next(stages)
        if self.observes == "ahead":
            self.rate.observe(out)
        if clear:
            self.clear()
        yield out if self.observes == "ahead" else None
        out = next(stages)
        if self.observes == "behind":
            self.rate.observe(out)
        list(stages)
        yield out if self.observes == "behind" else None


def loops(clears: tuple[str, ...]) -> list[tuple[str, str, str, str]]:
    """Every loop that a page shows, in all orders.

    The accumulator has no output to observe ahead. SequenceGradients writes gradients of which autograd knows nothing, so that
    model.zero_grad() is seen only where it comes after an observation and before the next backward.
    """
    impossible = {
        ("OPOBAccumulator", "ahead"),
        ("OPOBAccumulator", "middle"),
        ("SequenceGradients", "model.zero_grad", "ahead"),
        ("SequenceGradients", "model.zero_grad", "middle"),
    }
    return [
        (form, observes, clears_at, clear)
        for form, observes, clears_at, clear in itertools.product(
            FORMS, ("ahead", "behind"), ("start", "middle", "end"), clears
        )
        if not {(form, observes), (form, clears_at), (form, clear, observes), (form, clear, clears_at)} & impossible
    ]


def check(loop: Loop) -> None:
    assert loop.step(ALL) == 1
    assert loop.step(QUARTER) == pytest.approx(0.25)
    loop.step(QUARTER, skipped=True)
    assert loop.step(ALL) == 1
    loop.step(QUARTER, skipped=True)
    loop.step(QUARTER, skipped=True)
    assert loop.step(ALL) == 1
    assert loop.step(ALL, QUARTER) == pytest.approx(25 / 5 / 8)
    loop.step(QUARTER, ALL, skipped=True)
    assert loop.step(QUARTER, QUARTER) == pytest.approx(0.25)
    assert loop.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(("form", "observes", "clears_at", "clear"), loops(tuple(CLEARS)))
def test_the_step_after_a_skipped_one_runs_at_its_own_ess(form: str, observes: str, clears_at: str, clear: str) -> None:
    """A step left out by hand touches no gradient: nothing but their arrival and their end tells."""
    check(Loop(form, observes, clears_at, clear))


@pytest.mark.parametrize("skip", ["GradScaler", "GradScaler, fused"])
@pytest.mark.parametrize(("form", "observes", "clears_at", "clear"), loops(("zero_grad", "model.zero_grad")))
def test_the_step_after_one_that_the_scaler_skipped(
    form: str, observes: str, clears_at: str, clear: str, skip: str
) -> None:
    """The scaler unscales in place and does not call step(); a fused optimizer's step() is called and does nothing."""
    loop = Loop(form, observes, clears_at, clear, skip)
    assert loop.step(ALL) == 1
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.step(QUARTER, skipped=True)
    assert all(torch.equal(p, q) for p, q in zip(before, loop.model.parameters(), strict=True))
    assert loop.step(ALL) == 1
    assert not all(torch.equal(p, q) for p, q in zip(before, loop.model.parameters(), strict=True))


def test_an_unused_batch_between_steps_is_kept_until_its_gradient() -> None:
    """Both micro-batches are observed, gradients of before are cleared, and then comes one backward of both."""
    loop = Loop("vcpo_loss", "ahead", "end", "zero_grad")
    loop.step(ALL)
    first, second = plain(loop.model, QUARTER), plain(loop.model, ALL)
    for one in (first, second):
        loop.rate.observe(next(one))
    loop.optimizer.zero_grad()
    list(first), list(second)
    loop.optimizer.step()
    assert loop.rate.ratio == pytest.approx(25 / 5 / 8)


@pytest.mark.parametrize("between", ["replaced", "scaled", "looked at", "with a graph"])
def test_what_happens_to_gradients_on_the_way_is_no_end_of_them(between: str) -> None:
    """Averaging and clipping that assign param.grad, a diagnostic autograd.grad, and accumulation out of place keep what was
    observed for the step.
    """
    loop = Loop("vcpo_loss", "ahead", "end", "zero_grad")
    loop.step(ALL)
    loop.clear()
    for log_weights in (QUARTER, ALL):
        stats = vk.token_stats(loop.model(IDS), IDS, MASK, shift=True)
        if between == "looked at":
            torch.autograd.grad(stats.entropy.sum(), list(loop.model.parameters()), retain_graph=True)
        out = vk.vcpo_loss(stats, behavior(stats.logp, log_weights), REWARDS, 4, SEGMENTS)
        loop.rate.observe(out)
        out.loss.backward() if between != "with a graph" else stats.logp.sum().exp().backward(create_graph=True)
        for p in loop.model.parameters():
            if between == "replaced":
                p.grad = p.grad * 0.5
            elif between == "scaled":
                p.grad *= 0.5
    loop.optimizer.step()
    assert loop.rate.ratio == pytest.approx(25 / 5 / 8)


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_parameter_tells_a_new_gradient_from_a_sum(create_graph: bool) -> None:
    """Where no other parameter shows that gradients are still there; with a graph the sum is another tensor."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    rate = vk.EssLearningRate(optimizer)
    for observed in (QUARTER, ALL):
        rate.observe(observed)
        weight.square().sum().backward(create_graph=create_graph)
        rate.observe(torch.zeros(0))  # has it look at the gradient
    optimizer.step()
    assert rate.ratio == pytest.approx(25 / 5 / 8)


@pytest.mark.parametrize("observes", ["ahead", "behind"])
def test_saved_tensors_that_can_be_unpacked_once(observes: str) -> None:
    """Activation offloading and checkpoints count what they hand out: observing must not ask for any of it."""

    class Once:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor: Tensor | None = tensor.clone()

        def take(self) -> Tensor:
            assert self.tensor is not None, "unpacked twice"
            tensor, self.tensor = self.tensor, None
            return tensor

    loop = Loop("vcpo_loss", observes, "end", "zero_grad")
    for skipped in (False, True, False):
        with torch.autograd.graph.saved_tensors_hooks(Once, Once.take):
            ratio = loop.step(QUARTER if skipped else ALL, skipped=skipped)
    assert ratio == 1


def test_parameters_that_train_later() -> None:
    """A group that is added, and a layer that is unfrozen, tell of their gradients like the others."""
    loop = Loop("two phases", "ahead", "end", "model.zero_grad")
    embedding, linear = loop.model
    loop.rate.remove()
    embedding.requires_grad_(False)
    loop.optimizer = torch.optim.AdamW(embedding.parameters(), lr=0.1)
    loop.rate = vk.EssLearningRate(loop.optimizer)
    loop.optimizer.add_param_group({"params": list(linear.parameters())})
    check(loop)
    linear.requires_grad_(False)
    embedding.requires_grad_(True)
    check(loop)


def test_two_optimizers_of_one_loss() -> None:
    """Each hears of its own parameters' gradients; one scaler skips both."""
    loop = Loop("two phases", "ahead", "end", "model.zero_grad")
    loop.rate.remove()
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in loop.model)
    rates = [vk.EssLearningRate(o) for o in (first, second)]
    for log_weights, skipped in ((ALL, False), (QUARTER, True), (HALF.repeat(2), False)):
        stages = two_phases(loop.model, log_weights)
        out = next(stages)
        for rate in rates:
            rate.observe(out)
        list(stages)
        if not skipped:
            first.step()
            second.step()
        loop.model.zero_grad()
    assert [rate.ratio for rate in rates] == [0.5, 0.5]


@pytest.mark.parametrize("observes", ["ahead", "behind"])
def test_gradients_that_move_on_are_no_skipped_step(observes: str) -> None:
    """Megatron's DistributedDataParallel adds each gradient to `main_grad` as it arrives, takes it off its parameter, and puts
    the sums back for the step: no micro-batch is forgotten, and `reset()` does for a step that it skips.
    """
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def moves(p: Any) -> Callable[..., None]:
        def moved(*_: Any) -> None:
            p.main_grad += p.grad
            p.grad = None

        return moved

    nodes: list[Any] = []  # kept alive, as Megatron does
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)  # type: ignore[attr-defined]
        nodes.append(p.expand_as(p).grad_fn.next_functions[0][0])  # type: ignore[union-attr]
        nodes[-1].register_hook(moves(p))
    rate = vk.EssLearningRate(optimizer)

    def run(*micro_batches: Tensor) -> None:
        for log_weights in micro_batches:
            for stage, out in enumerate(plain(model, log_weights)):
                if stage == (observes == "behind"):
                    rate.observe(out)
        for p in model.parameters():
            p.grad = p.main_grad  # type: ignore[attr-defined]

    def clear() -> None:
        for p in model.parameters():
            p.grad = None
            p.main_grad.zero_()  # type: ignore[attr-defined]

    for _ in range(2):
        run(ALL, QUARTER)
        optimizer.step()
        assert rate.ratio == pytest.approx(0.625)  # ESS 5 of 8
        clear()
    run(QUARTER)
    rate.reset()  # the step is skipped
    clear()
    run(ALL)
    optimizer.step()
    assert rate.ratio == 1
