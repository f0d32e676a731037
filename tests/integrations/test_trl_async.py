"""VCPOAsyncTrainer against the written-out formula, through TRL's own planner, collator and loop (`trl_async_setup`)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import trl_setup as setup  # before trl.experimental, whose warning it silences

pytest.importorskip("requests", reason="TRL's asynchronous trainer needs requests")

from trl.experimental.async_grpo import AsyncGRPOConfig
from trl.trainer.base_config import _BaseConfig

from tests.integrations.trl_async_setup import samples, save_model, sequences, train
from vcpo_kernels.integrations.trl import VCPOAsyncTrainer, VCPOAsyncTrainingConfig, options

CLOSE = 1 - 1e-6


def wanted(trainer: Any, of: list[setup.Sequence], max_weight: float = 8.0) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and ESS ratio by the written-out formula: tokens averaged over each micro-batch of 8 samples."""
    policy = setup.float64_copy(trainer.model, trainer.recorder.models[0])
    log_weights, coefficients = [], []
    for start in (0, 8):
        part, batch = of[start : start + 8], samples(of)[start : start + 8]
        tokens = sum(len(s.completion) for s in part)
        for s, sample in zip(part, batch, strict=True):
            with torch.no_grad():
                big_l = float((setup.token_logp(policy, s) - torch.tensor(s.behavior_logp)).sum())
            log_weights.append(big_l)
            weight = min(math.exp(big_l), max_weight) if math.isfinite(big_l) else 0.0
            coefficients.append(weight * sample.advantage / tokens / 2)
    return setup.direct_gradient(policy, of, coefficients), setup.brute_force.ess_ratio(log_weights)[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path)
    return tmp_path


def test_the_gradient_is_the_corrected_policy_gradient_and_the_step_is_scaled(folder: Path) -> None:
    of = sequences()
    trainer = train(folder, of, max_weight=2.0)
    gradient, ratio = wanted(trainer, of, max_weight=2.0)
    assert setup.cosine(trainer.recorder.gradients[0], gradient) > CLOSE
    (entry,) = (e for e in trainer.state.log_history if "loss" in e)
    assert entry["batch/packing_ratio"] > 1  # samples did share tokens
    assert entry["vcpo/ess_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert entry["learning_rate"] == pytest.approx(0.5 * math.sqrt(ratio), rel=1e-4)
    after = dict(trainer.model.named_parameters())
    for name, g in trainer.recorder.gradients[0].items():
        torch.testing.assert_close(after[name], trainer.recorder.models[0][name] - entry["learning_rate"] * g)


def test_an_infinite_weight_drops_its_sample_and_an_unscored_token_weighs_nothing(folder: Path) -> None:
    of = sequences()
    of[3].behavior_logp[1] = -math.inf
    of[5].behavior_logp[2] = math.nan
    trainer = train(folder, of)
    policy = setup.float64_copy(trainer.model, trainer.recorder.models[0])
    with torch.no_grad():
        of[5].behavior_logp[2] = float(setup.token_logp(policy, of[5])[2])
    gradient, ratio = wanted(trainer, of)
    assert setup.cosine(trainer.recorder.gradients[0], gradient) > CLOSE
    (entry,) = (e for e in trainer.state.log_history if "loss" in e)
    assert entry["vcpo/nonfinite_sequences_total"] == 1
    assert entry["vcpo/ess_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_every_option_of_this_trl_is_in_exactly_one_table() -> None:
    own = {f.name for f in dataclasses.fields(AsyncGRPOConfig)} - {f.name for f in dataclasses.fields(_BaseConfig)}
    tables = [options.ASYNC_GRPO.honoured, set(options.ASYNC_GRPO.refused), set(options.ASYNC_GRPO.limited)]
    assert set.union(*map(set, tables)) == own
    assert sum(map(len, tables)) == len(own)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0.1),
        ("epsilon_high", 0.28),
        ("top_p", 0.9),
        ("top_k", 20),
        ("deepspeed", "a.json"),
        ("label_smoothing_factor", 0.1),
        ("optim", "lomo"),
    ],
)
def test_an_option_that_is_not_honoured_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"VCPOAsyncTrainingConfig does not honour(.|\n)*{name}='?{value}'?: \S"):
        setup.arguments(tmp_path, VCPOAsyncTrainingConfig, **{name: value})


def test_another_configuration_is_refused_with_the_name_to_change(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"args must be a VCPOAsyncTrainingConfig, got 'AsyncGRPOConfig'.*change the name"
    ):
        VCPOAsyncTrainer("nowhere", setup.reward, setup.arguments(tmp_path, AsyncGRPOConfig), setup.dataset())
