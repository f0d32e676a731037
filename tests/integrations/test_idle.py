"""An idle VCPO is said once, with the reason and the settings; one that has something to correct is never said to be idle."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vcpo_kernels.integrations import verl
from vcpo_kernels.integrations._idle import IdleWatch


def said(losses: list[tuple[float, float, float]], patience: int = 3) -> list[str]:
    watch = IdleWatch("test", patience)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for loss in losses:
            watch.see(*loss, "a reason", "A fix.")
    return [str(w.message) for w in caught]


IDLE = (1.0, 0.0, 0.0)


def test_once_after_its_patience() -> None:
    assert said([IDLE] * 2) == []
    (text,) = said([IDLE] * 9)
    assert text.startswith("test: a reason, so every weight is 1, ESS is the whole batch")
    assert text.endswith("A fix.")
    assert len(said([(0.99999, 0.003, -0.004)] * 3)) == 1  # two passes over the same parameters round differently


@pytest.mark.parametrize(
    "loss",
    [
        (0.5, 0.0, 0.0),
        (1.0, 0.5, 0.5),  # all alike, and none of them 1
        (1.0, -0.5, -0.5),
        (1.0, 0.0, 0.02),
        (math.nan, 0.0, 0.0),
        (1.0, math.nan, 0.0),
        (1.0, 0.0, -math.inf),
    ],
)
def test_one_other_weight_silences_it(loss: tuple[float, float, float]) -> None:
    """Also later: a run that once had weights is not idle where some steps have none."""
    assert said([IDLE, IDLE, loss, *[IDLE] * 9]) == []


def test_certain_is_said_at_once_and_once() -> None:
    watch = IdleWatch("test", 3)
    with pytest.warns(UserWarning, match="test: nothing is recorded, so every weight is 1.*Record it"):
        watch.certain("nothing is recorded", "Record it.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.certain("nothing is recorded", "Record it.")
        for _ in range(5):
            watch.see(*IDLE, "a reason", "A fix.")


def warned_by_training(folder: Path, rollouts: Any = None, **changes: Any) -> list[str]:
    pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")
    from tests.integrations import trl_setup

    trainer = trl_setup.trainer(folder, rollouts, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if "VCPO is idle" in str(w.message)]


@pytest.fixture
def without_logp() -> Any:
    pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")
    from tests.integrations import trl_setup

    return trl_setup.Rollouts(with_logp=False)


def test_an_on_policy_trl_script_is_told(tmp_path: Path, without_logp: Any) -> None:
    (text,) = warned_by_training(tmp_path, without_logp)
    assert text.startswith(
        "VCPOTrainer: a generation serves one optimizer step, and no log-probabilities of the sampler"
    )
    for option in (
        "num_iterations > 1",
        "steps_per_generation > gradient_accumulation_steps",
        "use_vllm=True",
        "rollout_func",
    ):
        assert option in text


def test_stale_or_recorded_is_not_told(tmp_path: Path, without_logp: Any) -> None:
    assert warned_by_training(tmp_path) == []  # the sampler's log-probabilities come with the samples
    assert warned_by_training(tmp_path, without_logp, num_iterations=2) == []


def test_a_sampler_that_is_the_trainer_is_told(tmp_path: Path, without_logp: Any) -> None:
    """Old log-probabilities are there, and never differ: the parameters do not move."""
    (text,) = warned_by_training(tmp_path, without_logp, num_iterations=2, learning_rate=0.0, max_steps=12)
    assert "have been the trainer's own so far" in text


def test_verls_recomputed_log_probs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """loss_mode=vcpo without bypass mode: verl hands the loss no other sign of it. Its aggregation is stood in for."""
    agg_loss = SimpleNamespace(agg_loss=lambda loss_mat, **rest: loss_mat.sum())
    monkeypatch.setattr(verl, "_core_algos", lambda: agg_loss)
    mask, config = torch.ones(2, 3), SimpleNamespace(global_batch_info={})

    def texts(shift: float) -> list[str]:
        monkeypatch.setattr(verl, "_IDLE", IdleWatch(verl.WHERE, 3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(8):
                logp = torch.full((2, 3), -1.0, requires_grad=True)
                old = logp.detach() - shift * torch.tensor([[1.0], [-1.0]])
                verl.policy_loss(old, logp, mask, mask, "token-mean", config, None, verl.PolicyLossOptions())
        return [str(w.message) for w in caught if "VCPO is idle" in str(w.message)]

    (text,) = texts(0.0)
    assert text.startswith("vcpo (verl): the old log-probabilities have been the trainer's own so far")
    assert "bypass_mode=True" in text
    assert texts(0.2) == []
