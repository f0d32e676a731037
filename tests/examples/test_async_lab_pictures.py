"""The comparison's tables and pictures: what counts as learning, what as a collapse, and that gaps are named."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from examples.async_lab.cli import paper_configs
from examples.async_lab.config import RunResult, warm_start_of
from examples.async_lab.export import read
from examples.async_lab.methods import METHODS
from examples.async_lab.pictures import (
    collapse_figure,
    ess_figure,
    panels_of,
    range_figure,
    stability_figure,
)
from examples.async_lab.tables import accuracy_table, collapse_at, range_table, state

from .async_lab import tiny

ROOT = Path(__file__).resolve().parents[2]


def run(accuracy: list[float], **changes: object) -> RunResult:
    task = str(changes.get("task", "sort"))
    config = replace(tiny(steps=10 * len(accuracy) - 10, eval_every=10), warm_start=warm_start_of(task), **changes)  # type: ignore[arg-type]
    result = RunResult(config)
    for i, value in enumerate(accuracy):
        figures = {"reward": 0.5, "ess_ratio": 0.1 + 0.01 * i, "grad_norm": 2.0, "rate_scale": 1.0}
        result.add(10 * i, value, [figures] if i else [])
    return result.finish("native", 1.0)


UP, DOWN = [0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7], [0.5, 0.6, 0.2, 0.45, 0.1, 0.1, 0.1]


def some_runs() -> list[RunResult]:
    return [
        run(UP if rate == 1e-4 else DOWN, method=method, rate=rate, seed=seed, lag=lag, task=task)
        for method in ("seq-tis", "vcpo")
        for rate in (1e-4, 1e-3)
        for seed in (1, 0)
        for task, lag in (("sort", 8), ("sort", 128), ("add", 8))
    ]


def test_a_collapse_is_where_a_run_stays_below() -> None:
    assert collapse_at(run(DOWN)) == 4  # not the dip at 2, from which it came back
    assert collapse_at(run(UP)) is None


def test_the_accuracy_table_holds_each_seed_and_names_what_has_not_run() -> None:
    runs = [r for r in some_runs() if not (r.config.method == "vcpo" and r.config.rate == 1e-3)]
    runs[0].final_accuracy = 0.62  # seed 1 of seq-tis at 1e-4, sort, lag 8
    lines = accuracy_table(runs, "sort", 8, ["seq-tis", "vcpo"]).splitlines()
    assert lines[0] == "| method | 0.0001 | 0.001 |"
    assert lines[2] == "| seq-tis | 0.66 (0.70 0.62) | 0.19 (0.19 0.19) |"
    assert lines[3] == "| vcpo | 0.70 (0.70 0.70) | not run |"


def test_one_seed_below_its_warm_start_ends_the_range() -> None:
    runs = [run(UP, rate=rate, seed=seed) for rate in (1e-4, 3e-4, 1e-3) for seed in (0, 1)]
    assert "| vcpo | 0.001; 0.70 | 0 of 6 |" in range_table(runs, [("sort", 1)])
    runs[3] = run(DOWN, rate=3e-4, seed=1)
    assert "| vcpo | 0.0001; 0.70 | 1 of 6 |" in range_table(runs, [("sort", 1)])
    assert "| none | not run | 0 of 0 |" in range_table(runs, [("sort", 1)])


def test_the_state_names_what_is_missing() -> None:
    runs = [run(UP, seed=0, lag=8), run(UP, seed=0, lag=8, method="none")]
    planned = [("sort", 8, 0), ("sort", 8, 0), ("sort", 8, 1)]
    assert state(runs, planned) == "2 of 3 runs have finished. Missing: 1 of sort at lag 8, seed 1."
    assert state(runs, planned[:2]) == "2 of 2 runs have finished. None is missing."


def test_pictures_are_drawn_of_unfinished_grids(tmp_path: Path) -> None:
    runs = some_runs()[:-1]
    assert panels_of(runs) == [("sort", 8), ("sort", 128), ("add", 8)]
    range_figure(runs, tmp_path / "range.png")
    ess_figure(runs, tmp_path / "ess.png")
    collapse_figure(runs, tmp_path / "collapse.png")
    stability_figure(runs, 8, tmp_path / "stability.png")
    drawn = [p.read_bytes() for p in tmp_path.glob("*.png")]
    assert len(drawn) == 4
    assert all(content.startswith(b"\x89PNG") for content in drawn)


def test_the_paper_takes_whole_seeds_first_and_every_method() -> None:
    configs = paper_configs()
    assert [c.seed for c in configs] == sorted(c.seed for c in configs)
    assert len({c.filename for c in configs}) == len(configs) == len(METHODS) * 3 * (4 * 3 + 2 * 2)
    assert Counter(c.task for c in configs) == {"sort": 576, "add": 192}


def test_the_committed_results_are_of_todays_settings() -> None:
    path = ROOT / "benchmarks" / "results" / "async_lab.csv"
    wanted = {c.filename for c in paper_configs()}
    runs = read(path)
    assert len(runs) == len(path.read_text().splitlines()) - 1
    assert {r.config.filename for r in runs} <= wanted
