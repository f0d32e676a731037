"""Two processes: turns give the synchronous loop, a bound on staleness holds, time to a target is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.async_lab import paced, race
from examples.async_lab.config import RunConfig
from examples.async_lab.paced import PacedResult, run_paced
from examples.async_lab.trainer import train
from examples.async_lab.warm_start import warm_model

from .async_lab import UNTRAINED, tiny

pytestmark = pytest.mark.filterwarnings("ignore:vcpo_kernels. .* slow reference backend")


def test_taking_turns_is_the_synchronous_loop(tmp_path: Path) -> None:
    config = tiny(lag=0, steps=6, rate=1e-2)
    warm_model(UNTRAINED, tmp_path)
    expected = train([config], tmp_path)[0]
    result = run_paced(config, tmp_path)
    assert result.staleness == [0] * 6
    assert result.steps == expected.eval_steps
    assert result.accuracy == pytest.approx(expected.accuracy, abs=1e-4)  # the latter is rounded to 4 digits
    assert result.seconds == sorted(result.seconds)


def test_rollouts_are_no_staler_than_the_bound_and_every_batch_is_used(tmp_path: Path) -> None:
    warm_model(UNTRAINED, tmp_path)
    steps: list[int] = []
    result = run_paced(tiny(lag=2, steps=20), tmp_path, lambda step, seconds: steps.append(step))
    assert steps == list(range(1, 21))
    assert max(result.staleness) in (1, 2)  # two batches are sampled before the first step
    assert 0 <= result.learner_waited < 1 and 0 <= result.sampler_waited < 1  # noqa: PT018


def test_time_to_a_target_is_that_of_the_smoothed_accuracy() -> None:
    accuracy = [0.5, 0.875, 0.5, 0.625, 0.75, 0.875]
    result = PacedResult(RunConfig(), list(range(6)), [float(i) for i in range(6)], accuracy)
    assert result.seconds_to(0.75) == 5.0
    assert result.seconds_to(0.6) == 2.0
    assert result.seconds_to(0.95) is None


def test_a_sampler_that_dies_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    model = warm_model(UNTRAINED, tmp_path)
    (tmp_path / UNTRAINED.filename).write_bytes(b"not a checkpoint")  # which the sampler process finds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paced, "warm_model", lambda config, folder: model)  # in this process alone
        with pytest.raises(RuntimeError, match="the sampler process died"):
            run_paced(tiny(lag=1), tmp_path)


def test_the_race_is_exported_and_read_back_as_a_table(tmp_path: Path) -> None:
    seconds, accuracy = [0.0, 2.0, 4.0, 8.0], [0.5, 0.75, 0.75, 0.75]
    steps = [0, 100, 200, 400]
    fast = PacedResult(RunConfig(lag=4, seed=0), steps, seconds, accuracy, [4] * 400, 0.25, 0.5)
    never = PacedResult(RunConfig(lag=4, seed=1), steps, seconds, [0.5] * 4, [2] * 400, 0.25, 0.5)
    race.export([fast, never], 0.75, tmp_path / "race.csv")
    assert race.markdown(tmp_path / "race.csv").splitlines()[2:] == [
        "| vcpo | 4 | 8.0 never | 50 | 3.0 | 25%, 50% | 0.59 |"
    ]
