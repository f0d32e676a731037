"""The lab's commands, tables and pictures."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vcpo_kernels as vk
from examples.async_lab import cli
from examples.async_lab.config import RunConfig, RunResult, save_result
from examples.async_lab.export import COLUMNS, export
from examples.async_lab.figures import curves_figure, rates_figure
from examples.async_lab.methods import METHODS

from .async_lab import tiny


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["grid"], ["paper"], ["race"], ["report"]])
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
        (["run", "--task", "chess"], "task must be one of sort, add; got 'chess'"),
        (["run", "--seeds", "a"], "--seeds must be whole numbers separated by commas; got 'a'"),
        (["grid", "--rates", "1e-3;1"], "--rates must be numbers separated by commas"),
        (["race", "--bounds", "1.5"], "--bounds must be whole numbers separated by commas; got '1.5'"),
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
                series = [0.5] * 2
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


@pytest.fixture
def finished() -> list[RunResult]:
    """Four runs of the comparison."""
    configs = [replace(RunConfig(), method=method, seed=seed) for method in ("seq-tis", "vcpo") for seed in (0, 1)]
    results = [RunResult(config) for config in configs]
    for result in results:
        for step in range(0, 401, 10):
            figures = {"reward": 0.5, "ess_ratio": 0.25, "grad_norm": 2.0, "rate_scale": 0.5}
            result.add(step, 0.5 + step / 1000, [figures] if step else [])
        result.finish("native", 3.0)
    return results


def test_paper_goes_on_from_the_csv_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: list[RunResult]
) -> None:
    csv = tmp_path / "all.csv"
    export(finished, csv)
    before = csv.read_text()
    monkeypatch.setattr(cli, "paper_configs", lambda: [r.config for r in finished])
    invoked = CliRunner().invoke(cli.app, ["paper", "--out", str(tmp_path / "fresh"), "--csv", str(csv)])
    assert invoked.exit_code == 0, invoked.output
    assert "4 runs taken from" in invoked.output
    assert csv.read_text() == before
    assert len(list((tmp_path / "fresh").glob("sort-*.json"))) == 4
    assert not list((tmp_path / "fresh").glob("*.pt"))  # nothing was left to be trained


def test_paper_reads_the_committed_file_and_does_not_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: list[RunResult]
) -> None:
    """Unasked: two of its four runs are this comparison's, and it keeps all four."""
    committed = tmp_path / "committed.csv"
    export(finished, committed)
    before = {path: path.read_text() for path in (committed, committed.with_suffix(".json"))}
    monkeypatch.setattr(cli, "COMMITTED", committed)
    monkeypatch.setattr(cli, "paper_configs", lambda: [r.config for r in finished[:2]])
    out = tmp_path / "out"
    invoked = CliRunner().invoke(cli.app, ["paper", "--out", str(out)])
    assert invoked.exit_code == 0, invoked.output
    assert {path: path.read_text() for path in before} == before
    assert len((out / "paper.csv").read_text().splitlines()) == 3
