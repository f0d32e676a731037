"""The asynchronous lab's page and its pictures, of which the README has one."""

from __future__ import annotations

from benchmarks.harness.results import RESULTS
from benchmarks.report.pages import PICTURES
from examples.async_lab import export, race
from examples.async_lab.cli import paper_configs
from examples.async_lab.config import RunResult
from examples.async_lab.pictures import collapse_figure, ess_figure, panels_of, range_figure, stability_figure
from examples.async_lab.tables import accuracy_table, range_table, state

# What the README shows of the lab: sorting at this lag, the usual corrections, VCPO and its parts, and its closest rivals.
LAG = 32
METHODS = ("none", "token-tis", "seq-tis", "m2po", "topr", "ess", "opob", "vcpo")


def read_runs() -> list[RunResult]:
    return export.read(RESULTS / "async_lab.csv")


def parts(runs: list[RunResult]) -> dict[str, str]:
    """The lab page's tables and its line on what has run, as Markdown."""
    panels = panels_of(runs)
    found = {f"{task} lag {lag}": accuracy_table(runs, task, lag) for task, lag in panels}
    planned = ((c.task, c.lag, c.seed) for c in paper_configs())
    raced = RESULTS / "async_lab_race.csv"
    found["race"] = race.markdown(raced) if raced.exists() else "Not measured on an idle machine yet."
    return found | {"range": range_table(runs, [p for p in panels if p[1] > 0]), "state": state(runs, planned)}


def draw(runs: list[RunResult]) -> None:
    stability_figure(runs, LAG, PICTURES / "stability.png")
    range_figure(runs, PICTURES / "async_lab_range.png")
    ess_figure(runs, PICTURES / "async_lab_ess.png")
    collapse_figure(runs, PICTURES / "async_lab_collapse.png")
