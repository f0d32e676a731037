"""The comparison runs, verifies before it times, writes what it says, and refuses what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import run
from benchmarks.cases.rows import FORWARD
from benchmarks.comparisons.rows import ERROR_BOUND

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


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernels' own bound, not a looser one, decides."""
    monkeypatch.setattr("benchmarks.harness.clock.FLUSH_BYTES", 1 << 20)
    monkeypatch.setitem(ERROR_BOUND, FORWARD, 0.0)
    result = runner.invoke(run.app, [*SMALL, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "over the bound" in result.output
    assert not (tmp_path / "token_stats.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--dtype", "int8"], "--dtype must be one of"), (["--rows", "10"], "--rows must be a multiple of 4")],
)
def test_wrong_options(options: list[str], message: str) -> None:
    result = runner.invoke(run.app, options)
    assert result.exit_code == 2
    assert message in result.output
