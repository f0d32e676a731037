"""The short way past the dispatcher: taken where nobody looks on, and only there; the same numbers either way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vcpo_kernels as vk

IDS = torch.tensor([1, 3, 0])


class Recorder(TorchDispatchMode):
    """What a selective checkpoint or a profiler of ops sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """Anyone's tensor that takes part in dispatch, as DTensor does."""


@pytest.fixture
def ops_called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often token_stats came through torch.ops."""
    calls: list[int] = []
    real = torch.ops.vcpo_kernels.token_stats

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def __call__(self, *arguments: Any) -> Any:
            calls.append(1)
            return real(*arguments)

    monkeypatch.setattr(torch.ops.vcpo_kernels, "token_stats", Spy())
    return calls


def run(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    stats = vk.token_stats(logits, IDS)
    (grad,) = torch.autograd.grad(stats.logp.sum() + (2 * stats.entropy).sum(), logits)
    return stats.logp, stats.entropy, stats.score_sqnorm, stats.lse, grad


def test_both_ways_give_the_same_to_the_bit(ops_called: list[int]) -> None:
    """One implementation stands behind both."""
    logits = torch.randn(3, 5, requires_grad=True)
    short = run(logits)
    assert not ops_called
    with Recorder():
        whole = run(logits)
    assert ops_called
    for a, b in zip(short, whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "look_on",
    [
        lambda: vk.token_stats(torch.randn(3, 5).as_subclass(Subclass), IDS),
        lambda: torch.func.grad(lambda z: vk.token_stats(z, IDS).logp.sum())(torch.randn(3, 5)),
    ],
    ids=["subclass", "functorch"],
)
def test_whoever_intercepts_ops_sees_them(look_on: Callable[[], object], ops_called: list[int]) -> None:
    """Subclasses and function transforms would get an op they cannot see into, or wrong numbers."""
    with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):  # whether they support it is theirs to say
        look_on()
    assert ops_called


def test_modes_see_the_op() -> None:
    """Selective checkpointing and fake tensors work by the op's name."""
    with Recorder() as recorder:
        vk.token_stats(torch.randn(3, 5), IDS)
    assert "vcpo_kernels.token_stats.default" in recorder.seen
    with FakeTensorMode() as mode:
        stats = vk.token_stats(mode.from_tensor(torch.randn(3, 5)), mode.from_tensor(IDS))
    assert stats.logp.shape == (3,)


def test_gradients_that_are_not_asked_for_stay_away() -> None:
    """A graph without a gradient to the logits, and a loss without its metrics', take the short way too."""
    logits = torch.randn(3, 5, requires_grad=True)
    with torch.no_grad():
        assert not vk.token_stats(logits, IDS).logp.requires_grad
    stats = vk.token_stats(logits, IDS)
    assert not stats.lse.requires_grad
    assert not stats.score_sqnorm.requires_grad
    stats.entropy.sum().backward()
    assert logits.grad is not None
