"""Statistics without gradients, then a forward with gradients in the same autocast region: every weight has its gradient.

Until torch 2.10 the region's cache keeps the casts that were made under no_grad, and the second forward's weights get none
(PyTorch #158232); `make test-oldest` runs these there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcpo_kernels as vk
from vcpo_kernels import objectives

pytestmark = pytest.mark.cpu_only("enters the CPU's autocast")

V, H = 13, 8
IDS = torch.arange(12).reshape(3, 4) % V
COEFFICIENTS = torch.linspace(-1, 1, 12).reshape(3, 4)
SEGMENTS = vk.Segments.padded(torch.ones(3, 4, dtype=torch.bool))
REWARDS = torch.tensor([1.0, 0.0, 0.5])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False)
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.up(self.table(ids)))

    def forward(self, ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.hidden(ids)))


def own_statistics(logits: Tensor) -> vk.TokenStats:
    logp = torch.log_softmax(logits.float(), -1).gather(-1, IDS[..., None])[..., 0]
    return vk.TokenStats(logp, torch.ones_like(logp), torch.ones_like(logp), torch.zeros_like(logp))


FIRST: dict[str, Callable[[Model], Any]] = {
    "token_stats": lambda m: vk.token_stats(m(IDS).logits, IDS),
    "weighted_logp": lambda m: vk.weighted_logp(m(IDS).logits, IDS, COEFFICIENTS),
    "linear_token_stats": lambda m: vk.linear_token_stats(m.hidden(IDS), m.head.weight, IDS),
    "linear_weighted_logp": lambda m: vk.linear_weighted_logp(m.hidden(IDS), m.head.weight, IDS, COEFFICIENTS),
    "vcpo_loss of statistics from elsewhere": lambda m: vk.vcpo_loss(
        own_statistics(m(IDS).logits), torch.full((3, 4), -2.0), REWARDS, 3, SEGMENTS
    ),
    "an objective of statistics from elsewhere": lambda m: objectives.ppo_clip(
        own_statistics(m(IDS).logits), torch.full((3, 4), -2.0), REWARDS, SEGMENTS
    ),
}
SECOND: dict[str, Callable[[Model], Tensor]] = {
    "token_stats": lambda m: (vk.token_stats(m(IDS).logits, IDS).logp * COEFFICIENTS).sum(),
    "weighted_logp": lambda m: vk.weighted_logp(m(IDS).logits, IDS, COEFFICIENTS)[0],
}


def gradients(model: Model, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("without", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("second", SECOND)
def test_every_weight_has_its_gradient(first: str, second: str, without: Callable[[], Any]) -> None:
    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, SECOND[second](model))
    with torch.autocast("cpu", torch.bfloat16):
        with without():
            FIRST[first](model)
        got = gradients(model, SECOND[second](model))
    torch.testing.assert_close(got, want)


def test_statistics_outside_the_block() -> None:
    """Only the forward is under no_grad; what it returned takes no gradient either."""
    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            logits = model(IDS).logits
        vk.token_stats(logits, IDS)
        got = gradients(model, SECOND["token_stats"](model))
    assert all(g is not None for g in got)


def test_the_documented_loop() -> None:
    """docs/usage.md, "In two phases", in one autocast region, against a region without a cache."""
    results = []
    model = Model()
    for cached in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached), vk.patch_head(model):
            with torch.no_grad():
                stats = model(IDS).token_stats(IDS)
            out = vk.vcpo_loss(stats, torch.full((3, 4), -2.0), REWARDS, 3, SEGMENTS)
            coefficients = SEGMENTS.spread(-out.coefficients)
            for rows in torch.arange(3).split(2):
                loss, _ = model(IDS[rows]).weighted_logp(IDS[rows], coefficients[rows])
                loss.backward()
        results.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert all(g is not None for g in results[0])
    torch.testing.assert_close(results[1], results[0])


def test_the_check_of_a_model_leaves_no_casts() -> None:
    """SequenceGradients calls a layer whose forward is an instance's own, under no_grad, to see what it computes."""
    model = Model()
    forward = model.up.forward
    model.up.forward = lambda x: forward(x)  # as accelerate and fused kernels put one
    with torch.autocast("cpu", torch.bfloat16):
        vk.SequenceGradients(model)
        got = gradients(model, SECOND["token_stats"](model))
    assert all(g is not None for g in got)
