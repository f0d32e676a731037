"""torch.set_default_device and set_default_dtype, as trainers set them while they build models, change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import vcpo_kernels as vk
from tests.core.public_calls import calls

T, V, H = 5, 7, 6


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


def numbers(result: Any) -> list[Tensor]:
    result = vars(result) if dataclasses.is_dataclass(result) else result
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def same(run: Callable[[], Any], default: str) -> None:
    want = numbers(run())
    with DEFAULTS[default]():
        got = numbers(run())
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", calls())
def test_functions(name: str, default: str) -> None:
    torch.manual_seed(0)
    function, arguments = calls()[name]
    same(lambda: function(**arguments), default)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.norms = nn.Sequential(nn.RMSNorm(H), nn.LayerNorm(H))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.norms(self.table(ids))).float().to(ids.device))


def opob(model: Tiny, ids: Tensor, rewards: Tensor) -> list[Tensor]:
    accumulator = vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(num_sequences=4))
    for group in range(2):
        accumulator.start_group(rewards[2 * group : 2 * group + 2])
        for row in ids[2 * group : 2 * group + 2].split(1):
            stats = vk.token_stats(model(row).logits, row, shift=True)
            accumulator.backward(stats, stats.logp.detach(), vk.Segments.padded(row >= 0))
        accumulator.finish_group()
    accumulator.output()
    return [p.grad for p in model.parameters() if p.grad is not None]


def sequence_gradients(model: Tiny, ids: Tensor, rewards: Tensor) -> list[Tensor]:
    with vk.SequenceGradients(model) as gradients, vk.patch_head(model):
        stats, segments = model(ids).token_stats(ids), vk.Segments.padded(ids >= 0)
        gradients.backward(segments.sum(stats.logp), segments)
        norms = gradients.squared_norms()
        gradients.accumulate_(rewards)
    return [norms, *(p.grad for p in model.parameters() if p.grad is not None)]


def step(model: Tiny, ids: Tensor, rewards: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rate = vk.EssLearningRate(optimizer)
    stats = vk.token_stats(model(ids).logits, ids, shift=True)
    out = vk.vcpo_loss(stats, stats.logp.detach() - rewards[:, None], rewards, 2, vk.Segments.padded(ids >= 0))
    out.loss.backward()
    rate.observe(out)
    optimizer.step()
    return [p.detach() for p in model.parameters()]


def head(model: Tiny, ids: Tensor, rewards: Tensor) -> list[Tensor]:
    with vk.patch_head(model):
        out = model(ids)
    stats = out.token_stats(ids)
    loss, _ = out.weighted_logp(ids, stats.entropy.detach())
    (loss + stats.logp.sum()).backward()
    return [loss.detach(), stats.logp.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("run", (opob, sequence_gradients, step, head), ids=lambda run: run.__name__)
def test_models(run: Callable[..., list[Tensor]], default: str) -> None:
    """With the model built, the data there, and the default changed afterwards."""
    torch.manual_seed(0)
    state, ids, rewards = Tiny().state_dict(), torch.randint(0, V, (4, T)), torch.tensor([1.0, 0.0, 0.25, 0.5])

    def fresh() -> list[Tensor]:
        with torch.device("cpu"), default_dtype(torch.float32):
            model = Tiny()
            model.load_state_dict(state)
        return run(model, ids, rewards)

    same(fresh, default)
