"""Devices that lack what sums need are named before anything ends in a stranger's error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import vcpo_kernels as vk
from vcpo_kernels import objectives
from vcpo_kernels.core import checks, registry


@pytest.mark.parametrize(
    "call",
    [
        lambda: vk.token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)),
        lambda: vk.Segments.padded(torch.ones(2, 3)).sum(torch.zeros(2, 3)),
        lambda: vk.linear_token_stats(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)),
        lambda: vk.effective_sample_size(torch.zeros(3)),
        lambda: vk.off_policy_baseline(torch.zeros(2), torch.zeros(2), torch.ones(2), 2),
        lambda: objectives.group_mean_advantages(torch.zeros(2), 2),
    ],
)
def test_a_device_without_float64_is_named(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Apple's MPS: the device, what it lacks, and where to go."""
    for module in (checks, registry):
        monkeypatch.setattr(module, "has_float64", lambda device_type: False)
    with pytest.raises((TypeError, RuntimeError), match=r"cpu.* has no float64.*\.cpu\(\)"):
        call()


def test_devices_with_float64() -> None:
    assert checks.has_float64("cpu")
    assert checks.has_float64("cuda")
    assert not checks.has_float64("no such device")
