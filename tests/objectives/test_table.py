"""The tables that trainers look methods up in."""

from __future__ import annotations

import inspect

import pytest
import torch

import vcpo_kernels as vk
from tests.objectives import ragged
from vcpo_kernels import objectives
from vcpo_kernels.objectives import ADVANTAGES, OBJECTIVES
from vcpo_kernels.objectives.build import METRICS
from vcpo_kernels.objectives.common import CommonTerms


@pytest.mark.parametrize("name", OBJECTIVES)
def test_entries_are_public_functions_with_known_hyperparameters(name: str) -> None:
    entry = OBJECTIVES[name]
    assert getattr(objectives, entry.function.__name__) is entry.function
    parameters = inspect.signature(entry.function).parameters
    assert list(parameters)[:4] == ["stats", "behavior_logp", "advantages", "segments"]
    assert set(entry.hyperparameters) <= set(parameters)
    assert "aggregation" in parameters
    assert entry.title
    assert entry.source


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_output_has_the_common_metrics(name: str) -> None:
    batch = ragged.make()
    out = OBJECTIVES[name](batch.stats(), batch.mu, batch.advantages, batch.segments, max_tokens=8.0)
    assert set(METRICS) <= set(out.metrics)
    assert out.metrics["num_sequences"] == 5
    assert out.metrics["num_tokens"] == 16
    assert out.metrics["ess_ratio"] == out.ess_ratio
    torch.testing.assert_close(out.metrics["policy_loss"], out.loss.detach())


def test_keywords_override_an_entrys_hyperparameters() -> None:
    batch = ragged.make()
    a, b = (
        OBJECTIVES["dapo"](batch.stats(), batch.mu, batch.advantages, batch.segments, clip_high=0.2).loss,
        OBJECTIVES["ppo"](batch.stats(), batch.mu, batch.advantages, batch.segments).loss,
    )
    assert a == b


def test_advantages_are_public_functions() -> None:
    for entry in ADVANTAGES.values():
        assert getattr(objectives, entry.function.__name__) is entry.function


def test_public_names_exist_and_are_documented() -> None:
    for name in objectives.__all__:
        value = getattr(objectives, name)
        assert value.__doc__ or isinstance(value, dict), name
    assert vk.objectives is objectives
    assert set(CommonTerms.__annotations__) >= {"reference_logp", "entropy_coefficient", "num_tokens"}
