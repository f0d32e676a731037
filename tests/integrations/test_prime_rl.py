"""prime-rl's documented custom loss: `fn(inputs: LossInputs, **kwargs) -> LossOutputs`, one call per sequence.

prime-rl is on no package index. The two dataclasses are written out below from its documentation (docs/algorithms.md, "Custom
Loss"), and `step_loss` aggregates as that page says: summed over sequences, divided by the step's rl tokens on all ranks.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.integrations.trainer_batches import Batch, batch, token_advantages, vcpo
from vcpo_kernels.integrations import _ess_channel, prime_rl


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_ess_channel, "_PROCESS", _ess_channel._Process())
    _ess_channel._PROCESS.warned = True
    yield
    _ess_channel.stop_expecting()
    for rate in _ess_channel.attached():
        _ess_channel.detach(rate)


def inputs(b: Batch, advantages: Tensor, i: int, **more: Tensor) -> LossInputs:
    return LossInputs(b.logp()[i], b.mu[i], None, advantages[i], b.mask[i], **more)


def step_loss(b: Batch, advantages: Tensor, sequences: range, **kwargs: object) -> Tensor:
    """What prime-rl differentiates for a micro-batch; it imports the function by its dotted path."""
    module, _, name = "vcpo_kernels.integrations.prime_rl.vcpo_loss".rpartition(".")
    loss = getattr(importlib.import_module(module), name)
    total = torch.zeros((), dtype=torch.float64)
    for i in sequences:
        result = loss(inputs(b, advantages, i), **kwargs)
        assert type(result) is LossOutputs
        assert all(value.dim() == 0 for value in result.metrics.values())
        total = total + result.loss
    return total / int(b.mask.sum())


@pytest.mark.parametrize("max_weight", [8.0, 0.5, 0])
def test_sequences_one_by_one_are_vcpo_loss(max_weight: float) -> None:
    """Gradient and value over two micro-batches, NaN in what the loss mask excludes; max_weight=0 truncates nothing."""
    b = batch()
    config = vk.VCPOConfig(aggregation="token-mean", max_weight=max_weight or None)
    out, gradient = vcpo(b, config)
    losses = [step_loss(b, token_advantages(b, out), part, max_weight=max_weight) for part in (range(3), range(3, 8))]
    total = sum(torch.autograd.grad(loss, b.logits)[0] for loss in losses)
    torch.testing.assert_close(total, gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(losses), out.loss)


def test_loss_weights_scale_their_tokens() -> None:
    """A component's weight stream multiplies the per-token loss and not the importance weight."""
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    advantages, stream = token_advantages(b, out), torch.rand(8, 7, dtype=torch.float64)
    got = prime_rl.vcpo_loss(inputs(b, advantages, 1, loss_weights=stream[1]))
    scaled = prime_rl.vcpo_loss(inputs(b, advantages * stream, 1))
    torch.testing.assert_close(
        torch.autograd.grad(got.loss, b.logits)[0], torch.autograd.grad(scaled.loss, b.logits)[0]
    )
    torch.testing.assert_close(got.metrics["vcpo/log_weight"], out.log_weights[1])


def test_step_is_scaled_by_the_ess_of_its_sequences() -> None:
    """prime-rl owns its optimizer: attached at its first step, whose sequences came one by one, in two micro-batches."""
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    weight = torch.nn.Parameter(b.logits.detach().clone())
    trained = Batch(weight, b.ids, b.mask, b.mu, b.rewards, b.group)
    prime_rl.attach_to_next_optimizer()
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    for part in (range(3), range(3, 8)):
        step_loss(trained, token_advantages(b, out), part).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert (weight - b.logits).abs().max().item() == pytest.approx(out.ess_ratio.sqrt().item(), rel=1e-4)
    after = prime_rl.vcpo_loss(inputs(trained, token_advantages(b, out), 0))
    assert after.metrics["vcpo/last_step_ess_ratio"].item() == pytest.approx(out.ess_ratio.item())
    assert after.metrics["vcpo/last_step_lr_scale"].item() == pytest.approx(out.ess_ratio.sqrt().item())


def test_without_an_optimizer_it_says_how() -> None:
    _ess_channel._PROCESS.warned = False
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    with pytest.warns(UserWarning, match=r"vcpo_loss \(prime-rl\): no optimizer is attached.*attach_to_next_optimizer"):
        prime_rl.vcpo_loss(inputs(b, token_advantages(b, out), 0))


def test_what_does_not_fit_is_refused() -> None:
    b = batch()
    ones = torch.ones(8, 7, dtype=torch.float64)
    whole = LossInputs(b.logp(), b.mu, None, ones, b.mask)
    with pytest.raises(ValueError, match=r"inputs.trainer_logprobs must be \[seq\], one sequence per call"):
        prime_rl.vcpo_loss(whole)
    with pytest.raises(TypeError, match=r"inputs.advantages must be a torch\.Tensor, got None"):
        prime_rl.vcpo_loss(LossInputs(b.logp()[0], b.mu[0], None, None, b.mask[0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_weight must be finite and > 0, got -2"):
        prime_rl.vcpo_loss(inputs(b, ones, 0), max_weight=-2)
    with pytest.raises(ValueError, match=r"inputs.loss_weights must have shape"):
        prime_rl.vcpo_loss(inputs(b, ones, 0, loss_weights=torch.ones(3)))


def test_inputs_of_another_module_are_refused() -> None:
    from types import SimpleNamespace

    b = batch()
    fields = {"trainer_logprobs": b.logp()[0], "inference_logprobs": b.mu[0], "loss_mask": b.mask[0]}
    with pytest.raises(TypeError, match="LossInputs, whose module has LossOutputs too"):
        prime_rl.vcpo_loss(SimpleNamespace(**fields, advantages=torch.ones(7)))


def test_the_pages_module_attaches() -> None:
    """docs/prime_rl.md's module, imported as prime-rl imports it: its loss is there, and an optimizer is expected."""
    (module,) = re.findall(r"```python\n(.*?)```", Path("docs/prime_rl.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(module, names)
    assert names["vcpo_loss"] is prime_rl.vcpo_loss
    assert _ess_channel._PROCESS.expecting is not None
