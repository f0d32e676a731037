"""The lab's promises: exact lag, losses that are what they are called, repeatable seeds, resumable runs."""

from __future__ import annotations

import copy
import json
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
from torch import Tensor
from typer.testing import CliRunner

import vcpo_kernels as vk
from examples.async_lab import cli, workers
from examples.async_lab.config import RunConfig, RunResult, WarmStartConfig, load_result, save_result
from examples.async_lab.export import COLUMNS, export
from examples.async_lab.figures import curves_figure, rates_figure
from examples.async_lab.methods import METHODS
from examples.async_lab.model import Transformer, sample
from examples.async_lab.tasks import TASKS
from examples.async_lab.trainer import Rollouts, Stopped, Trainer, train
from examples.async_lab.warm_start import generator, model_for, warm_model

pytestmark = pytest.mark.filterwarnings("ignore:vcpo_kernels. .* slow reference backend")

ROOT = Path(__file__).resolve().parents[2]
UNTRAINED = WarmStartConfig(target=0.01)  # reached by guessing, so no supervised step is taken


def tiny(**changes: object) -> RunConfig:
    config = RunConfig(lag=1, steps=2, prompts=2, samples=4, eval_every=1, eval_prompts=8, warm_start=UNTRAINED)
    return replace(config, **changes)  # type: ignore[arg-type]


def trainer(**changes: object) -> Trainer:
    torch.manual_seed(0)
    return Trainer(tiny(**changes), model_for(TASKS["sort"]))


def token_logp(model: Transformer, rollouts: Rollouts) -> Tensor:
    """log pi of each response token from one pass without a cache, in plain torch."""
    logits = model(torch.cat([rollouts.prompts, rollouts.responses], 1))
    first, length = rollouts.prompts.shape[1] - 1, rollouts.responses.shape[1]
    log_p = logits[:, first : first + length].log_softmax(-1)
    return log_p.gather(-1, rollouts.responses.unsqueeze(-1)).squeeze(-1)


# --- lag and sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_rollouts_come_from_the_policy_lag_steps_ago(lag: int) -> None:
    lab = trainer(lag=lag, steps=6, rate=1e-2)
    versions: list[Transformer] = []  # the parameters before each learner step
    learn = lab.learn

    def checked(rollouts: Rollouts) -> dict[str, float]:
        step = len(versions)
        versions.append(copy.deepcopy(lab.model))
        assert rollouts.version == max(0, step - lag)
        close = [torch.allclose(rollouts.logp, token_logp(model, rollouts), atol=1e-5) for model in versions]
        assert close == [version == rollouts.version for version in range(len(versions))]
        return learn(rollouts)

    lab.learn = checked  # type: ignore[method-assign]
    for _ in range(6):
        lab.train_step()
    assert len(versions) == 6


def test_every_batch_is_sampled_and_learned_from_once() -> None:
    lab = trainer(lag=3, steps=5)
    for _ in range(5):
        lab.train_step()
    assert lab.sampled == 5
    assert not lab.queue


def test_a_lag_beyond_the_run_samples_no_more_than_the_run_needs() -> None:
    assert len(trainer(lag=100, steps=2).queue) == 2


def test_temperature_is_that_of_the_recorded_logp() -> None:
    model, prompts = model_for(TASKS["sort"]), TASKS["sort"].prompts(4, generator(0))
    hot, logp = sample(model, prompts, 12, generator(1), temperature=2.0)
    log_p = (model(torch.cat([prompts, hot], 1))[:, 12:-1] / 2.0).log_softmax(-1)
    torch.testing.assert_close(logp, log_p.gather(-1, hot.unsqueeze(-1)).squeeze(-1), rtol=1e-4, atol=1e-5)


def test_greedy_decoding_takes_the_likeliest_token() -> None:
    model, prompts = model_for(TASKS["sort"]), TASKS["sort"].prompts(4, generator(0))
    tokens, _ = sample(model, prompts, 12)
    assert torch.equal(tokens, model(torch.cat([prompts, tokens], 1))[:, 12:-1].argmax(-1))


def test_sort_rewards_the_fraction_of_right_places() -> None:
    task = TASKS["sort"]
    prompts = task.prompts(3, generator(0))
    answers = task.answers(prompts)
    assert task.rewards(prompts, answers).tolist() == [1.0, 1.0, 1.0]
    answers[0, :3] = 10
    assert task.rewards(prompts, answers).tolist() == [0.75, 1.0, 1.0]


# --- methods ------------------------------------------------------------------------------------------------


def stale_trainer(method: str) -> Trainer:
    """A trainer whose next rollouts are off-policy."""
    lab = trainer(method=method, lag=3, steps=8, rate=3e-3)
    for _ in range(3):
        lab.train_step()
    return lab


def gradient_of(lab: Trainer, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(lab.model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def written_by_hand(method: str, lab: Trainer, rollouts: Rollouts) -> Tensor:
    """A surrogate with the method's gradient, from its definition and nothing of the package."""
    logits = lab.model(torch.cat([rollouts.prompts, rollouts.responses], 1)).double()[:, 12:-1]
    p = logits.softmax(-1)
    logp = p.gather(-1, rollouts.responses.unsqueeze(-1)).squeeze(-1).log()
    log_ratio = (logp - rollouts.logp.double()).detach()
    log_w = log_ratio.sum(1)
    one_hot = torch.nn.functional.one_hot(rollouts.responses, 11)
    norms = (one_hot - p.detach()).square().sum((1, 2))
    rewards = rollouts.rewards.double().view(-1, 4)
    a = (2 * log_w + norms.log()).view(-1, 4).softmax(1)
    if method not in ("vcpo", "opob"):
        a = torch.full_like(a, 0.25)
    baseline = (a * rewards).sum(1, keepdim=True)
    std = rewards.std(1, correction=0, keepdim=True)
    advantages = torch.where(std > 1e-8, (rewards - baseline) / std, 0.0).flatten()
    w = log_w.exp()
    if method == "none":
        weights = torch.ones(8, 1)
    elif method == "token-tis":
        weights = log_ratio.exp().clamp(max=2.0)
    elif method == "seq-mask":
        weights = torch.where(w <= 8.0, w, 0.0).unsqueeze(1)
    else:
        weights = w.clamp(max=8.0).unsqueeze(1)
    return -(weights * advantages.unsqueeze(1) * logp).mean()


@pytest.mark.parametrize("method", METHODS)
def test_gradient_equals_the_formula_written_out(method: str) -> None:
    lab = stale_trainer(method)
    rollouts = lab.queue[0]
    out = lab.loss(rollouts)
    assert out.ess_ratio < 0.99  # else the batch says nothing about weights
    expected = gradient_of(lab, written_by_hand(method, lab, rollouts))
    actual = gradient_of(lab, out.loss)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_sequence_mask_drops_what_truncation_keeps() -> None:
    lab = stale_trainer("seq-mask")
    rollouts = lab.queue[0]
    heavy = torch.tensor([1.0] + [0.0] * 7).unsqueeze(1)  # twelve tokens later: one sequence of weight e^12
    rollouts = replace(rollouts, logp=token_logp(lab.model, rollouts).detach() - heavy)
    log_w = lab.loss(rollouts).log_weights
    assert log_w[0] > math.log(8.0) > log_w[1:].max()
    masked = gradient_of(lab, lab.loss(rollouts).loss)
    torch.testing.assert_close(
        masked, gradient_of(lab, written_by_hand("seq-mask", lab, rollouts)), rtol=1e-3, atol=1e-5
    )
    lab.method = METHODS["seq-tis"]
    assert not torch.allclose(masked, gradient_of(lab, lab.loss(rollouts).loss), rtol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_two_steps(method: str, tmp_path: Path) -> None:
    result = train(tiny(method=method), tmp_path)
    assert result.eval_steps == [0, 1, 2]
    for name in ("accuracy", "reward", "ess_ratio", "grad_norm", "rate_scale"):
        values = getattr(result, name)
        assert len(values) == (3 if name == "accuracy" else 2)
        assert all(math.isfinite(value) for value in values)
    assert result.best_accuracy == max(result.accuracy)
    assert result.backend in ("native", "reference")


def test_a_result_names_the_backend_that_served_it(tmp_path: Path) -> None:
    with vk.use_backend("reference"):
        assert train(tiny(), tmp_path).backend == "reference"


@pytest.mark.parametrize(("method", "scaled"), [("seq-tis", False), ("opob", False), ("ess", True), ("vcpo", True)])
def test_the_step_is_scaled_by_the_root_of_the_ess_ratio(method: str, scaled: bool) -> None:
    lab = stale_trainer(method)
    figures = lab.train_step()
    assert figures["rate_scale"] == pytest.approx(math.sqrt(figures["ess_ratio"]) if scaled else 1.0, rel=1e-5)
    assert lab.optimizer.param_groups[0]["lr"] == lab.config.rate


# --- results, seeds, resuming -------------------------------------------------------------------------------


def test_same_seed_same_curves_other_seed_other_curves(tmp_path: Path) -> None:
    first, again, other = (train(tiny(seed=seed, steps=4), tmp_path) for seed in (0, 0, 1))
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
    result = train(tiny(), tmp_path)
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
        save_result(train(config, tmp_path), tmp_path)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: pytest.fail("a worker was started"))
    outcome = workers.run_all(configs, tmp_path, workers=2)
    assert [outcome.results[i].config.seed for i in range(2)] == [0, 1]


@pytest.mark.slow
def test_workers_run_what_is_missing(tmp_path: Path) -> None:
    configs = [tiny(seed=0), tiny(seed=1)]
    save_result(train(configs[0], tmp_path), tmp_path)
    before = (tmp_path / configs[0].filename).read_text()
    messages: list[workers.Message] = []
    outcome = workers.run_all(configs, tmp_path, workers=1, on_message=messages.append)
    assert sorted(outcome.results) == [0, 1]
    assert {message.run for message in messages} == {1}
    assert (tmp_path / configs[0].filename).read_text() == before
    assert messages[-1].finished


def test_stop_ends_a_run_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tiny(), tmp_path, stop=lambda: True)
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


# --- commands and output ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["grid"], ["report"]])
def test_help(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "ppo"], "method must be one of none, token-tis, seq-tis"),
        (["run", "--rate", "-1"], "rate must be a finite number > 0; got -1.0"),
        (["run", "--rate", "nan"], "rate must be a finite number > 0; got nan"),
        (["run", "--lag", "-1"], "lag must be a whole number >= 0; got -1"),
        (["run", "--task", "chess"], "task must be one of sort; got 'chess'"),
        (["run", "--seeds", "a"], "--seeds must be whole numbers separated by commas; got 'a'"),
        (["grid", "--rates", "1e-3;1"], "--rates must be numbers separated by commas"),
    ],
)
def test_wrong_options_say_what_is_wanted(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def fake_results() -> list[RunResult]:
    results = []
    for i, method in enumerate(METHODS):
        for rate in (1e-4, 1e-3):
            for seed in (0, 1):
                config = tiny(method=method, rate=rate, seed=seed, lag=8 + 24 * seed, steps=20)
                curve = [0.5 + 0.01 * i] * 3
                series = [0.5] * 20
                results.append(RunResult(config, [0, 10, 20], curve, series, series, series, series, 0.5, 0.5, 1.0))
    return results


def test_figures_and_tables_hold_every_run(tmp_path: Path) -> None:
    results = fake_results()
    rates_figure(results, tmp_path / "grid.png")
    curves_figure([r for r in results if r.config.lag == 8], tmp_path / "curves.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("grid.png", "curves.png"))
    export(results, tmp_path / "all.csv")
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert len(lines) == 1 + len(results)
    metadata = json.loads((tmp_path / "all.json").read_text())
    assert metadata["runs"] == len(results)
    assert metadata["versions"]["vcpo_kernels"] == vk.__version__


def test_the_grid_names_what_has_not_run(tmp_path: Path) -> None:
    from rich.console import Console

    from examples.async_lab.display import grid_tables

    results = [
        r for r in fake_results() if r.config.lag == 8 and not (r.config.method == "vcpo" and r.config.rate > 5e-4)
    ]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in grid_tables(results):
        console.print(table)
    assert "not run" in console.export_text()


def test_report_gathers_finished_runs(tmp_path: Path) -> None:
    empty = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, ["report", "--out", str(tmp_path)])
    assert empty.exit_code == 2
    assert "has none" in empty.output
    results = [r for r in fake_results() if r.config.lag == 8]
    for result in results[:4]:
        save_result(result, tmp_path)
    arguments = ["report", "--steps", "20", "--out", str(tmp_path), "--csv", str(tmp_path / "all.csv")]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 5
    assert (tmp_path / "grid.png").exists()
