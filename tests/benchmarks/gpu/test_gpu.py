"""`make gpu` without a GPU: the whole harness at tiny sizes, and each of its promises on made-up results."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bench, choose, phases, report, row_cases, tables, targets
from benchmarks.gpu.clock import Clock, times_of
from benchmarks.gpu.plan import DRY, GPU, TOTAL_SECONDS, Phase
from benchmarks.gpu.results import ResultLog, read, write_csv
from vcpo_kernels.core.measured import Win


def test_gpu_plan_fits_nine_minutes() -> None:
    assert sum(p.seconds for p in GPU.phases) <= TOTAL_SECONDS <= 9 * 60
    assert GPU.headline not in GPU.shapes
    assert len({*GPU.shapes, GPU.headline}) == 5 * 5 * 2
    missing = [t for t in GPU.tests if not (phases.ROOT / t).exists()]
    assert not missing


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


def test_a_phase_is_killed_with_its_children(tmp_path: Path) -> None:
    """What it wrote stays; a grandchild that ignores SIGTERM does not."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    outcome = phases.run_command([sys.executable, "-c", parent], tmp_path / "log", 1.5, tmp_path, {}, "slow")
    assert outcome.status == phases.TIMED_OUT
    assert "begun" in outcome.tail
    assert time.monotonic() - started < 20


def test_a_phase_without_time_is_not_run(tmp_path: Path) -> None:
    outcome = phases.run_phase(Phase("shapes", 45), phases.Workplace(DRY, tmp_path), left=0.2)
    assert outcome.status == phases.NOT_RUN


def test_failures_come_first(tmp_path: Path) -> None:
    log = ResultLog(tmp_path)
    log.add("failure", work="forward", name="cuda", rows=1, vocabulary=2, dtype="float32", reason="wrong: error 1")
    log.add("phase", phase="tests", status="timed out", seconds=9.0, tail="on it\n")
    name = "tests/gpu/test_rows.py::test_views"
    (tmp_path / "tests.log").write_text(f"{name}[a] PASSED\n[gw1] [ 3%] FAILED {name}[b] \nFAILED {name}[b] - no\n")
    report.write(tmp_path, GPU)
    text = (tmp_path / "report.md").read_text()
    assert text.index("## Failures") < text.index("## Targets") < text.index("## Results")
    for line in ("- forward, cuda, N=1 V=2 float32: wrong: error 1", "- phase tests timed out", f"- test {name}[b]"):
        assert text.count(line) == 1
    assert "1 failed, 1 passed" in text
    summary, clean = report.summary(tmp_path, GPU)
    assert not clean
    assert "failures: 3" in summary


def headline_row(work: str, name: str, **fields: object) -> dict[str, object]:
    shape = bench.shape_fields(GPU.headline)
    return {"kind": "time", "work": work, "name": name, "device": "cuda", "spread": 0.0, **shape, **fields}


def test_targets_are_judged_by_the_better_backend() -> None:
    rows = [
        headline_row(row_cases.FORWARD, "cuda", median_ms=0.9, of_copy=0.91),
        headline_row(row_cases.FORWARD, "triton", median_ms=0.84, of_copy=0.93),
        headline_row(row_cases.BACKWARD, "cuda", median_ms=3.0, of_copy=0.89),
        headline_row(row_cases.BACKWARD, targets.peers.LIGER_SEQUENCE, median_ms=4.5, of_copy=0.99, peer=True),
    ]
    judged = {(t.work, t.quantity): (m and m.value, s) for t, m, s in targets.evaluate(rows, GPU)}
    assert judged[row_cases.FORWARD, targets.COPY] == (0.93, targets.REACHED)
    assert judged[row_cases.FORWARD, "ms"] == (0.84, targets.REACHED)
    assert judged[row_cases.BACKWARD, f"{targets.COPY}, 3 NV"] == (0.89, targets.MISSED)
    assert judged[row_cases.BACKWARD, "times Liger's sequence path"] == (1.5, targets.REACHED)
    assert judged[row_cases.SCORE, f"{targets.COPY}, 2 NV"] == (None, targets.NOT_MEASURED)


def test_wins_are_where_the_spread_is_beaten() -> None:
    """A tie is no win, a loss at one number of rows spoils a width, and a range ends at the last width that was won."""

    def pair(vocabulary: int, cuda: float, triton: float, rows: int = 8) -> list[dict[str, object]]:
        at = {"vocabulary": vocabulary, "rows": rows, "spread": 0.02}
        return [headline_row(row_cases.SCORE, n, median_ms=ms) | at for n, ms in (("cuda", cuda), ("triton", triton))]

    rows = pair(100, 1, 2) + pair(200, 1, 1.5) + pair(300, 1, 1.03) + pair(400, 1, 2) + pair(400, 2, 1, rows=1)
    assert choose.wins(rows) == (Win("score_rows", "bfloat16", 100, 200),)
    assert choose.wins([r | {"device": "cpu"} for r in rows]) == ()


def test_results_survive_a_cut_and_a_second_process(tmp_path: Path) -> None:
    log = ResultLog(tmp_path)
    row = log.add("time", work="forward", name="cuda", rows=1, vocabulary=2, dtype="float32", median_ms=1.0)
    with open(log.path, "a") as file:
        file.write('{"kind": "ti')
    assert read(log.path) == [row]
    next_row = log.add("check", name="next")
    assert read(log.path) == [row, next_row]
    assert ("forward", "cuda", 1, 2, "float32") in log.known()
    write_csv([row], tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().splitlines()[1] == "time,forward,cuda,1,2,float32,1.0"


def small_bench(tmp_path: Path, seconds: float = 60) -> bench.Bench:
    return bench.Bench(DRY, Clock(DRY), ResultLog(tmp_path), time.monotonic() + seconds)


def test_a_wrong_result_is_a_failure_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cases, "error_bound", lambda *a: 0.0)
    bench.rows_job(small_bench(tmp_path), DRY.headline, row_cases.GRID)
    kinds = {r["kind"] for r in read(tmp_path / "results.jsonl") if r["work"] != "copy"}
    assert kinds == {"failure"}


def test_out_of_time_is_said_of_every_case(tmp_path: Path) -> None:
    bench.rows_job(small_bench(tmp_path, seconds=0), DRY.headline, row_cases.GRID)
    rows = read(tmp_path / "results.jsonl")
    assert len(rows) == len(row_cases.GRID) * len(DRY.backends)
    assert {(r["kind"], r["reason"]) for r in rows} == {("left out", "out of time")}


def test_an_absent_backend_is_left_out_with_its_reason(tmp_path: Path) -> None:
    here = small_bench(tmp_path)
    here.plan = dataclasses.replace(DRY, backends=("cuda",))
    bench.rows_job(here, DRY.headline, row_cases.GRID)
    rows = read(tmp_path / "results.jsonl")
    assert {r["kind"] for r in rows} == {"left out"}
    assert "runs on cuda tensors, not on cpu" in json.dumps(rows)


def test_spread_is_between_the_passes() -> None:
    times = times_of([1.0, 2.0, 3.0], [1.0, 1.0, 9.0])
    assert (times.first_ms, times.second_ms, times.spread, times.repeats) == (2.0, 1.0, 1.0, 6)


def test_tables_are_made_of_gpu_runs_alone(tmp_path: Path) -> None:
    log = ResultLog(tmp_path / "some-gpu")
    log.add(**headline_row(row_cases.FORWARD, "triton", median_ms=0.84, of_copy=0.93))  # type: ignore[arg-type]
    (folder,) = tables.gpu_folders(tmp_path)
    environment = {"plan": "gpu", "devices": [{"name": "Some GPU"}], "packages": {"torch": "2", "triton": "3"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    assert "| forward | triton | 0.840 | 0.93 |  |" in tables.markdown(folder)
    (folder / "environment.json").write_text(json.dumps(environment | {"plan": "dry run"}))
    with pytest.raises(ValueError, match="no run on a GPU"):
        tables.markdown(folder)
