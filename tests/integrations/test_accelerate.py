"""The Accelerate loop of docs/accelerate.md: the same steps as the plain loop, wrappers, skipped steps, two processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vcpo_kernels as vk

pytest.importorskip("accelerate", reason="pip install accelerate")
pytest.importorskip("transformers", reason="the loop's model is Hugging Face's: pip install transformers")
import accelerate
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

from examples.loops import accelerate_loop, ddp_loop


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_same_steps_as_the_plain_loop() -> None:
    """accumulate(), backward()'s division and the wrapped optimizer come to the same gradient, ESS and rate."""
    model, ratios = accelerate_loop.train(cpu=True)
    plain, history = ddp_loop.train()
    torch.testing.assert_close(ratios, [step["ess_ratio"] for step in history], rtol=1e-4, atol=0)
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)


def test_two_processes_are_one() -> None:
    from tests.integrations import two_ranks

    model, ratios = accelerate_loop.train(cpu=True)
    two_ranks.same("accelerate", model, ratios)


def test_wrapper_is_refused_by_name() -> None:
    accelerate.Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    with pytest.raises(
        TypeError, match=r"AcceleratedOptimizer that wraps another .*inner optimizer \(often `.optimizer`\)"
    ):
        vk.EssLearningRate(optimizer)
    vk.EssLearningRate(optimizer.optimizer)


def test_step_that_the_scaler_skips_leaves_nothing() -> None:
    """Accelerate's wrapper with its GradScaler: overflow skips the step, and zero_grad takes the observation with it."""
    accelerate.Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([weight], lr=1.0)
    rate = vk.EssLearningRate(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer: Any = AcceleratedOptimizer(inner, scaler=scaler)

    def micro_batch(log_weights: torch.Tensor, overflow: bool) -> None:
        ids = torch.arange(4)[:, None] % 2
        logits = (weight + torch.zeros(4, 1, 1)) * torch.tensor([1.0, 0.0])
        stats = vk.token_stats(logits, ids)
        mu = stats.logp.detach() - log_weights[:, None]
        out = vk.vcpo_loss(stats, mu, torch.arange(4.0), 4, vk.Segments.padded(torch.ones(4, 1)))
        rate.observe(out)
        scaler.scale(out.loss).backward()
        if overflow:
            weight.grad = torch.full((1,), torch.inf)
        optimizer.step()
        optimizer.zero_grad()

    micro_batch(torch.tensor([0.0, -1e4, -1e4, -1e4]), overflow=True)
    assert optimizer.step_was_skipped
    assert rate.ratio is None
    micro_batch(torch.zeros(4), overflow=False)
    assert not optimizer.step_was_skipped
    assert rate.ratio == 1
