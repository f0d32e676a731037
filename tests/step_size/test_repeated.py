"""An engine's step in several calls of the inner optimizer: one factor for all, and a step without an observation at none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk

HALF = torch.tensor([0.0, -1e4, -1e4, -1e4])  # an ESS of one in four: the rate is halved
QUARTER = torch.full((16,), -1e4).index_fill_(0, torch.tensor(0), 0.0)


@contextmanager
def stage_2(optimizer: Any, index: int, parts: list[Tensor]) -> Iterator[None]:
    """One of the groups at a time, in a list of its own."""
    groups = optimizer.param_groups
    optimizer.param_groups = [groups[index]]
    yield
    optimizer.param_groups = groups


@contextmanager
def stage_3(optimizer: Any, index: int, parts: list[Tensor]) -> Iterator[None]:
    """One sub-group at a time, the others' parameters out of sight."""
    optimizer.param_groups[0]["params"] = [parts[index]]
    yield
    optimizer.param_groups[0]["params"] = []


STAGES = {"2": stage_2, "3": stage_3}


def made(stage: str, tensor_rate: bool = False) -> tuple[Any, list[Tensor]]:
    parts = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    rate = torch.tensor(1.0) if tensor_rate else 1.0
    groups = [{"params": [p]} for p in parts]
    optimizer = torch.optim.SGD(
        groups if stage == "2" else parts, lr=rate, **({"foreach": True} if tensor_rate else {})
    )
    return optimizer, parts


def engine_step(stage: str, optimizer: Any, parts: list[Tensor]) -> list[float]:
    """A gradient of ones for each part; how far each went."""
    before = [p.detach().clone() for p in parts]
    for index, part in enumerate(parts):
        part.grad = torch.ones(2)
        with STAGES[stage](optimizer, index, parts):
            optimizer.step()
        part.grad = None
    return [float((b - p.detach())[0]) for b, p in zip(before, parts, strict=True)]


@pytest.mark.parametrize("tensor_rate", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_goes_at_the_same_factor(stage: str, tensor_rate: bool) -> None:
    optimizer, parts = made(stage, tensor_rate)
    rate = vk.EssLearningRate(optimizer)
    for log_weights, factor in ((HALF, 0.5), (QUARTER, 0.25), (HALF, 0.5)):
        rate.observe(log_weights)
        assert engine_step(stage, optimizer, parts) == [factor] * 3
        assert all(float(group["lr"]) == 1.0 for group in optimizer.param_groups)
        assert float(rate.scale) == factor  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_without_an_observation_is_full(stage: str) -> None:
    """Also after one that had one: the parameters are the same again, so that it is another step."""
    optimizer, parts = made(stage)
    rate = vk.EssLearningRate(optimizer)
    rate.observe(HALF)
    engine_step(stage, optimizer, parts)
    with pytest.warns(UserWarning, match="without an observe") as warned:
        assert engine_step(stage, optimizer, parts) == [1.0] * 3
    assert len(warned) == 1
    rate.observe(HALF)
    assert engine_step(stage, optimizer, parts) == [0.5] * 3


def test_reset_ends_a_step() -> None:
    optimizer, parts = made("3")
    rate = vk.EssLearningRate(optimizer)
    rate.observe(HALF)
    for part, factor in zip(parts[:2], (0.5, 1.0), strict=True):
        part.grad = torch.ones(2)
        optimizer.param_groups[0]["params"] = [part]
        if factor == 1.0:
            rate.reset()
            with pytest.warns(UserWarning, match="without an observe"):
                optimizer.step()
        else:
            optimizer.step()
        assert float(part.detach()[0]) == -factor
