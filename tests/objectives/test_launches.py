"""What a call costs beside the arithmetic: operations as the profiler counts them, and what of them a GPU would launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import vcpo_kernels as vk
from vcpo_kernels import objectives
from vcpo_kernels.core import checks

B, T, V = 4, 16, 8

# Half of what each took before sums, casts and metrics were shared (docs/performance.md), and what vcpo_loss takes.
CALLS = {"gspo": 124, "cispo": 104, "topr": 117, "ppo_clip": 116, "vcpo_loss": 30}
LAUNCHES = {"gspo": 106, "cispo": 85, "topr": 98, "ppo_clip": 99, "vcpo_loss": 2}

pytestmark = pytest.mark.cpu_only("counted without a GPU")


def call_of(name: str, drift: float = 0.1) -> Callable[[], Any]:
    """A healthy padded batch, of which nothing is to be said: logits that far from the sampler's."""
    logits, mask = torch.randn(B, T, V), torch.ones(B, T, dtype=torch.bool)
    ids = torch.distributions.Categorical(logits=logits).sample()
    mu = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    stats = vk.token_stats((logits + drift * torch.randn(B, T, V)).requires_grad_(), ids, mask)
    segments, rewards = vk.Segments.padded(mask), torch.randn(B)
    if name == "vcpo_loss":
        return lambda: vk.vcpo_loss(stats, mu, rewards, 2, segments)
    return lambda: getattr(objectives, name)(stats, mu, rewards, segments)


@pytest.mark.parametrize("drift", [0.1, 1e-5])
@pytest.mark.parametrize("name", CALLS)
def test_calls_on_a_cpu(name: str, drift: float) -> None:
    """Each costs a host some microseconds, more than 64 tokens' arithmetic: they are the price of a small batch.

    As many on policy, where the ratios are rounding.
    """
    call = call_of(name, drift)
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    top = [event for event in profiled.events() if event.cpu_parent is None]
    assert 0 < len(top) <= CALLS[name], sorted(event.name for event in top)


class Launches(TorchDispatchMode):
    """Names of the operations that compute: neither views nor Python's numbers as tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and func._schema.name != "aten::scalar_tensor":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU can tell: what is dispatched where no value may be read."""
    call = call_of(name)
    monkeypatch.setattr(checks, "readable", lambda value: False)
    with Launches() as launches:
        call()
    assert 0 < len(launches.names) <= LAUNCHES[name], sorted(launches.names)
