"""Tables of committed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cases import rows as row_cases
from benchmarks.gpu import tables
from benchmarks.harness.results import ResultLog
from benchmarks.report import gpu_run
from tests.benchmarks.gpu.made_up import headline_row


def test_tables_are_made_of_gpu_runs_alone(tmp_path: Path) -> None:
    log = ResultLog(tmp_path / "some-gpu")
    log.add(**headline_row(row_cases.FORWARD, "triton", median_ms=0.84, of_copy=0.93))  # type: ignore[arg-type]
    (folder,) = gpu_run.folders(tmp_path)
    environment = {"plan": "gpu", "devices": [{"name": "Some GPU"}], "packages": {"torch": "2", "triton": "3"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    assert "| forward | triton | 0.840 | 0.93 |  |" in tables.markdown(folder)
    (folder / "environment.json").write_text(json.dumps(environment | {"plan": "dry run"}))
    with pytest.raises(ValueError, match="no run on a GPU"):
        tables.markdown(folder)
