"""A second derivative of a kernel is an error, never a silent zero; the linear segment ops have theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk

IDS, C = torch.tensor([1, 2, 0]), torch.tensor([1.0, -2.0, 0.5])
WEIGHT = torch.linspace(-1, 1, 20).view(5, 4)

_HELD: list[Tensor] = []


def held(logits: Tensor) -> Tensor:
    """Logits that somebody still holds when their gradient is taken."""
    _HELD[:] = [logits]
    return logits


# A function of logits [3, 5] or of hidden states [3, 4], whose gradient comes out of a kernel.
OPS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "token_stats": (5, lambda z: vk.token_stats(z, IDS).logp.sum()),
    "token_stats entropy": (5, lambda z: vk.token_stats(z, IDS).entropy.sum()),
    "token_stats in place": (5, lambda z: vk.token_stats(z * 1, IDS, inplace_backward=True).logp.sum()),
    "weighted_logp": (5, lambda z: vk.weighted_logp(z, IDS, C)[0]),
    "weighted_logp in place": (5, lambda z: vk.weighted_logp(held(z * 1), IDS, C, inplace=True)[0]),
    "linear_token_stats fast": (4, lambda h: vk.linear_token_stats(h, WEIGHT, IDS, memory="fast").logp.sum()),
    "linear_token_stats lean": (4, lambda h: vk.linear_token_stats(h, WEIGHT, IDS, memory="lean").logp.sum()),
    "linear_token_stats weight": (4, lambda h: vk.linear_token_stats(h, WEIGHT * h.sum(), IDS).logp.sum()),
    "linear_weighted_logp": (4, lambda h: vk.linear_weighted_logp(h, WEIGHT, IDS, C)[0]),
}


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    width, function = OPS[request.param]
    return torch.randn(3, width, requires_grad=True), function


def test_the_first_derivative_is_right_all_the_same(op: tuple[Tensor, Callable[[Tensor], Tensor]]) -> None:
    """create_graph=True alone changes no number."""
    x, function = op
    (want,) = torch.autograd.grad(function(x), x)
    (got,) = torch.autograd.grad(function(x), x, create_graph=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("ask", ("backward", "grad"))
def test_the_second_is_an_error(ask: str, op: tuple[Tensor, Callable[[Tensor], Tensor]]) -> None:
    """Also among terms that have one, where autograd would leave ours out without a word."""
    x, function = op
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    penalty = first.square().sum() + x.square().sum()
    with pytest.raises(RuntimeError, match=r"vcpo_kernels\.\w+ has no second derivative.*create_graph=False"):
        penalty.backward() if ask == "backward" else torch.autograd.grad(penalty, x)


def test_inputs_that_are_gone_are_refused_at_once() -> None:
    """Of logits that nobody holds any more nothing could be made to depend: create_graph=True itself is then the error."""
    x = torch.randn(3, 5, requires_grad=True)
    loss, _ = vk.weighted_logp(x * 1, IDS, C)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_segment_sums_are_linear_and_may_be_differentiated_again() -> None:
    values = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    segments = vk.Segments.padded(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert torch.autograd.gradgradcheck(segments.sum, (values,))
    assert torch.autograd.gradgradcheck(lambda v: segments.spread(v), (values[:, 0].detach().requires_grad_(),))
