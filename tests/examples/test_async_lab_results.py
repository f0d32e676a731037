"""The lab's results: repeatable seeds, files that resume, workers that stop, a CSV that a fresh clone goes on from."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.async_lab import workers
from examples.async_lab.config import (
    SERIES,
    RunConfig,
    RunResult,
    WarmStartConfig,
    load_result,
    save_result,
    warm_start_of,
)
from examples.async_lab.export import COLUMNS, export, read, restore
from examples.async_lab.methods import METHODS
from examples.async_lab.tasks import TASKS
from examples.async_lab.trainer import Stopped, train
from examples.async_lab.warm_start import warm_model

from .async_lab import UNTRAINED, tiny

pytestmark = pytest.mark.filterwarnings("ignore:vcpo_kernels. .* slow reference backend")

ROOT = Path(__file__).resolve().parents[2]


def train_one(config: RunConfig, folder: Path) -> RunResult:
    return train([config], folder)[0]


@pytest.mark.parametrize("task", TASKS)
def test_all_methods_train_two_steps_together(task: str, tmp_path: Path) -> None:
    start = replace(UNTRAINED, task=task, target=1e-9, max_steps=0) if task == "add" else UNTRAINED
    if task == "add":  # no sum is right by chance, so the untrained model is put where the warm start would be
        from examples.async_lab.warm_start import model_for

        torch.save(model_for(TASKS[task]).state_dict(), tmp_path / start.filename)
    configs = [tiny(method=method, task=task, warm_start=start) for method in METHODS]
    for result in train(configs, tmp_path):
        assert result.eval_steps == [0, 1, 2]
        for name in ("accuracy", *SERIES):
            values = getattr(result, name)
            assert len(values) == (3 if name == "accuracy" else 2)
            assert all(math.isfinite(value) for value in values)
        assert result.best_accuracy == max(result.accuracy)
        assert result.backend in ("native", "reference")


def test_series_are_means_between_evaluations(tmp_path: Path) -> None:
    every, second = (train_one(tiny(steps=4, eval_every=n), tmp_path) for n in (1, 2))
    assert second.eval_steps == [0, 2, 4]
    for name in SERIES:
        fine, coarse = getattr(every, name), getattr(second, name)
        assert coarse == pytest.approx([(fine[0] + fine[1]) / 2, (fine[2] + fine[3]) / 2], rel=1e-2)


def test_same_seed_same_curves_other_seed_other_curves(tmp_path: Path) -> None:
    first, again, other = (train_one(tiny(seed=seed, steps=4), tmp_path) for seed in (0, 0, 1))
    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
    assert first.reward != other.reward
    assert first.accuracy[0] == other.accuracy[0]  # the warm start and the held-out prompts are shared


def test_warm_start_is_trained_once_and_depends_on_its_seed_alone(tmp_path: Path) -> None:
    config = replace(UNTRAINED, target=0.12, batch=16)
    torch.manual_seed(5)
    first = warm_model(config, tmp_path / "a").state_dict()
    written = (tmp_path / "a" / config.filename).stat().st_mtime_ns
    torch.manual_seed(6)
    warm_model(config, tmp_path / "a")
    assert (tmp_path / "a" / config.filename).stat().st_mtime_ns == written
    second = warm_model(config, tmp_path / "b").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_warm_start_out_of_reach_says_what_it_got() -> None:
    from examples.async_lab.warm_start import train as supervise

    with pytest.raises(RuntimeError, match=r"sampled accuracy 0\.9 within 0 steps; it got 0\.\d+"):
        supervise(WarmStartConfig(target=0.9, max_steps=0))


def test_json_round_trips(tmp_path: Path) -> None:
    result = train_one(tiny(), tmp_path)
    text = result.to_json()
    assert RunResult.from_json(text).to_json() == text
    assert RunResult.from_json(text).config == result.config
    save_result(result, tmp_path)
    assert load_result(result.config, tmp_path) == RunResult.from_json(text)
    assert [p.name for p in tmp_path.glob("*.json")] == [result.config.filename]


@pytest.mark.parametrize("text", ["[]", '{"config": 3}', '{"config": {}}', "{}"])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a run's result must be a JSON object of config, eval_steps"):
        RunResult.from_json(text)


def test_every_setting_has_a_file_of_its_own() -> None:
    changes = [{}, {"lag": 2}, {"rate": 1e-4}, {"seed": 1}, {"steps": 3}, {"method": "none"}, {"clip": 2.0}]
    assert len({tiny(**change).filename for change in changes}) == len(changes)


def test_finished_runs_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [tiny(seed=0), tiny(seed=1)]
    for config in configs:
        save_result(train_one(config, tmp_path), tmp_path)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: pytest.fail("a worker was started"))
    outcome = workers.run_all(configs, tmp_path, workers=2)
    assert [outcome.results[i].config.seed for i in range(2)] == [0, 1]


@pytest.mark.slow
def test_workers_run_what_is_missing(tmp_path: Path) -> None:
    configs = [tiny(seed=0), tiny(seed=1)]
    save_result(train_one(configs[0], tmp_path), tmp_path)
    before = (tmp_path / configs[0].filename).read_text()
    messages: list[workers.Message] = []
    outcome = workers.run_all(configs, tmp_path, workers=1, on_message=messages.append)
    assert sorted(outcome.results) == [0, 1]
    assert {message.run for message in messages} == {1}
    assert (tmp_path / configs[0].filename).read_text() == before
    assert messages[-1].finished


def test_stop_ends_a_run_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train([tiny()], tmp_path, stop=lambda: True)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_ctrl_c_keeps_what_has_finished_and_says_how_to_resume(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "examples.async_lab",
        "run",
        "--lag",
        "1",
        "--steps",
        "100000",
        "--out",
        str(tmp_path),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("warm-start-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(8)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. 0 of 1 runs" in output
    assert "resumes" in output


# --- workers' pieces and the CSV ----------------------------------------------------------------------------


def test_pieces_hold_runs_of_one_shape_in_order() -> None:
    configs = [tiny(lag=lag, seed=seed) for seed in (0, 1) for lag in (1, 2)]
    pieces = workers.together(configs, [0, 1, 2, 3], most=2)
    assert [[run for run, _ in piece] for piece in pieces] == [[0, 2], [1, 3]]
    assert [[run for run, _ in piece] for piece in workers.together(configs, [2, 3, 1], most=1)] == [[2], [3], [1]]


def committed(**changes: object) -> RunResult:
    """A run as the commands make it, with curves that no rounding leaves alone."""
    config = replace(RunConfig(warm_start=warm_start_of("sort")), **changes)  # type: ignore[arg-type]
    result = RunResult(config)
    result.add(0, 1 / 3)
    for step in range(10, config.steps + 1, 10):
        figures = {"reward": step / 7, "ess_ratio": 1 / step, "grad_norm": step**0.5, "rate_scale": 1.0}
        result.add(step, 1 / step, [figures])
    return result.finish("native", 1.2345)


def test_the_csv_holds_all_that_a_runs_file_does(tmp_path: Path) -> None:
    results = [committed(seed=seed, method=method) for seed in (0, 1) for method in ("vcpo", "none")]
    export(results, tmp_path / "all.csv")
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    by_name = {r.config.filename: r for r in results}
    assert {r.config.filename: r for r in read(tmp_path / "all.csv")} == by_name
    again = tmp_path / "again.csv"
    export(read(tmp_path / "all.csv"), again)
    assert again.read_text() == (tmp_path / "all.csv").read_text()


def test_a_fresh_folder_goes_on_from_the_csv(tmp_path: Path) -> None:
    results = [committed(seed=seed) for seed in (0, 1)]
    export(results, tmp_path / "all.csv")
    folder = tmp_path / "fresh"
    save_result(replace(results[0], seconds=9.0), folder)
    assert restore(tmp_path / "all.csv", folder) == 1
    assert load_result(results[0].config, folder) == replace(results[0], seconds=9.0)  # what is there stays
    assert load_result(results[1].config, folder) == results[1]
    assert restore(tmp_path / "missing.csv", folder) == 0


def test_rows_of_other_settings_are_not_taken_for_todays(tmp_path: Path) -> None:
    export([committed(seed=0), committed(seed=1, clip=2.0)], tmp_path / "all.csv")
    text = (tmp_path / "all.csv").read_text()
    assert [r.config.seed for r in read(tmp_path / "all.csv")] == [0]
    (tmp_path / "all.csv").write_text(text.replace(",vcpo,", ",renamed,"))
    assert read(tmp_path / "all.csv") == []
