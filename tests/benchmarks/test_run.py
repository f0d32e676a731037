"""The comparison runs, verifies before it times, writes what it says, and refuses what it cannot do."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import options, run, run_linear, run_sequence_gradients, run_steps
from benchmarks.cases.rows import FORWARD
from benchmarks.comparisons.rows import ERROR_BOUND
from examples import baseline_study
from examples.async_lab import cli

runner = CliRunner()
SMALL = ["--rows", "8", "--vocabulary", "500", "--repeats", "1", "--device", "cpu", "--no-peers"]


def test_writes_every_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.clock.FLUSH_BYTES", 1 << 20)
    result = runner.invoke(run.app, [*SMALL, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "token_stats.jsonl").read_text().splitlines()]
    assert {"forward", "forward + backward", "copy", "layout"} == {r["work"] for r in rows}
    assert all(r["max_error"] <= ERROR_BOUND[r["work"]] for r in rows if "max_error" in r)
    for name in ("token_stats.csv", "token_stats.png", "environment.txt"):
        assert (tmp_path / name).stat().st_size > 0
    assert str(Path.cwd()) not in (tmp_path / "environment.txt").read_text()  # results are committed


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernels' own bound, not a looser one, decides."""
    monkeypatch.setattr("benchmarks.harness.clock.FLUSH_BYTES", 1 << 20)
    monkeypatch.setitem(ERROR_BOUND, FORWARD, 0.0)
    result = runner.invoke(run.app, [*SMALL, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "over the bound" in result.output
    assert not (tmp_path / "token_stats.jsonl").exists()


def test_committed_results_are_written_only_when_asked() -> None:
    """Where each command goes: git ignores runs/."""
    cpu = torch.device("cpu")
    assert options.folder_of(None, False, cpu).parts[:2] == ("runs", "bench")
    assert options.folder_of(None, True, cpu).parts[:2] == ("benchmarks", "results")
    assert options.folder_of(Path("mine"), False, cpu) == Path("mine")
    assert "/runs/" in Path(".gitignore").read_text().splitlines()


def test_no_command_goes_to_committed_folders_by_default() -> None:
    apps = (run.app, run_linear.app, run_sequence_gradients.app, run_steps.app, baseline_study.app, cli.app)
    seen = [
        Path(default)
        for app in apps
        for command in app.registered_commands
        for default in (p.default for p in inspect.signature(command.callback).parameters.values())
        if isinstance(default, Path)
    ]
    assert {path.parts[0] for path in seen} == {"runs"}


@pytest.mark.parametrize("app", [run.app, run_linear.app, run_sequence_gradients.app, run_steps.app])
def test_two_folders_are_refused(app: typer.Typer, tmp_path: Path) -> None:
    """Before anything is measured."""
    result = runner.invoke(app, ["--commit", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--out and --commit name two folders" in result.output


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(["--dtype", "int8"], "--dtype must be one of"), (["--rows", "10"], "--rows must be a multiple of 4")],
)
def test_wrong_options(wrong: list[str], message: str) -> None:
    result = runner.invoke(run.app, wrong)
    assert result.exit_code == 2
    assert message in result.output


def test_steps_refuses_an_unknown_model() -> None:
    result = runner.invoke(run_steps.app, ["--model", "gpt-9"])
    assert result.exit_code == 2
    assert "--model must be of llama-512" in result.output
