"""A job says of every case what came of it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from benchmarks.cases import rows as row_cases
from benchmarks.gpu.jobs import rows as rows_job
from benchmarks.gpu.jobs.workbench import Workbench, clock_of
from benchmarks.gpu.plan import DRY
from benchmarks.harness.results import ResultLog, read


def small_bench(tmp_path: Path, seconds: float = 60) -> Workbench:
    return Workbench(DRY, clock_of(DRY), ResultLog(tmp_path), time.monotonic() + seconds)


def test_a_wrong_result_is_a_failure_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cases, "error_bound", lambda *a: 0.0)
    rows_job.ours(small_bench(tmp_path), DRY.headline, row_cases.GRID)
    kinds = {r["kind"] for r in read(tmp_path / "results.jsonl") if r["work"] != "copy"}
    assert kinds == {"failure"}


def test_out_of_time_is_said_of_every_case(tmp_path: Path) -> None:
    rows_job.ours(small_bench(tmp_path, seconds=0), DRY.headline, row_cases.GRID)
    rows = read(tmp_path / "results.jsonl")
    assert len(rows) == len(row_cases.GRID) * len(DRY.backends)
    assert {(r["kind"], r["reason"]) for r in rows} == {("left out", "out of time")}


def test_an_absent_backend_is_left_out_with_its_reason(tmp_path: Path) -> None:
    here = small_bench(tmp_path)
    here.plan = dataclasses.replace(DRY, backends=("cuda",))
    rows_job.ours(here, DRY.headline, row_cases.GRID)
    rows = read(tmp_path / "results.jsonl")
    assert {r["kind"] for r in rows} == {"left out"}
    assert "runs on cuda tensors, not on cpu" in json.dumps(rows)
