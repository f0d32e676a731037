"""The result file outlives the process that writes it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.results import ResultLog, read, write_csv


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
