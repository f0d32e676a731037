"""`make gpu` without a GPU: the whole command at tiny sizes, and the order of its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.cases import rows as row_cases
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.plan import DRY, GPU
from benchmarks.harness.results import ResultLog, read
from benchmarks.report import gpu_run as report


def test_dry_run_goes_through_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of every phase, and a folder that says of itself that it holds no GPU figures."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    quick = ("environment", "build", "headline", "shapes")
    plan = dataclasses.replace(DRY, phases=tuple(p for p in DRY.phases if p.name in quick))
    assert command.run(plan, tmp_path), (tmp_path / "report.md").read_text()
    rows = read(tmp_path / "results.jsonl")
    assert [r["status"] for r in rows if r["kind"] == "phase"] == ["passed"] * len(quick)
    assert {r["work"] for r in rows if r["kind"] == "time"} >= {c.work for c in row_cases.CASES}
    assert len(list(tmp_path.iterdir())) <= 8
    assert report.NO_FIGURE in (tmp_path / "report.md").read_text()
    assert {p.name for p in tmp_path.iterdir()} <= set(command.OUTPUTS)


def test_failures_come_first(tmp_path: Path) -> None:
    log = ResultLog(tmp_path)
    log.add("failure", work="forward", name="cuda", rows=1, vocabulary=2, dtype="float32", reason="wrong: error 1")
    log.add("phase", phase="tests", status="timed out", seconds=9.0, tail="on it\n")
    name = "tests/gpu/test_rows.py::test_views"
    (tmp_path / "tests.log").write_text(f"{name}[a] PASSED\n[gw1] [ 3%] FAILED {name}[b] \nFAILED {name}[b] - no\n")
    command.write_report(tmp_path, GPU)
    text = (tmp_path / "report.md").read_text()
    assert text.index("## Failures") < text.index("## Targets") < text.index("## Results")
    for line in ("- forward, cuda, N=1 V=2 float32: wrong: error 1", "- phase tests timed out", f"- test {name}[b]"):
        assert text.count(line) == 1
    assert "1 failed, 1 passed" in text
    summary, clean = command.summary(tmp_path, GPU)
    assert not clean
    assert "failures: 3" in summary
