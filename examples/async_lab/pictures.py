"""The comparison's pictures, from finished runs: stable ranges, accuracy against ESS, what comes before a collapse."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from .config import RunResult
from .display import mean
from .figures import COLOURS, GRID, INK, QUIET, STYLE
from .methods import METHODS
from .tables import COLLAPSED, collapse_at
from .tasks import TASKS

TITLES = {"sort": "sorting", "add": "addition"}
BEFORE, AFTER = 150, 50  # steps around a collapse
Panel = tuple[str, int]  # task and lag


def panels_of(runs: Sequence[RunResult]) -> list[Panel]:
    """Tasks in their order, lags ascending."""
    tasks = list(TASKS)
    return sorted({(r.config.task, r.config.lag) for r in runs}, key=lambda p: (tasks.index(p[0]), p[1]))


def _at(runs: Iterable[RunResult], panel: Panel) -> list[RunResult]:
    return [r for r in runs if (r.config.task, r.config.lag) == panel]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- the stable range -----------------------------------------------------------------------------------------------


def range_figure(results: Iterable[RunResult], path: Path) -> None:
    """Final accuracy by method and rate, one panel a task and lag; white is the warm start, red below it."""
    runs = list(results)
    panels = panels_of(runs)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(2.6 + 1.5 * len(panels), 5.6), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            _range_panel(axis, _at(runs, panel), panel)
        axes[0, 0].set_yticks(range(len(METHODS)), [m.title for m in METHODS.values()], fontsize=9)
        for label, method in zip(axes[0, 0].get_yticklabels(), METHODS, strict=True):
            label.set_color(INK)
            label.set_fontweight("bold" if method.startswith("vcpo") else "normal")
        figure.suptitle(
            "Final accuracy by learning rate: blue above the warm start, red below",
            x=0.01,
            ha="left",
            fontweight="bold",
        )
        figure.supxlabel(
            "learning rate. Cells: mean of the seeds that have run; a dash: none has.",
            x=0.01,
            ha="left",
            fontsize=8,
            color=QUIET,
        )
        _save(figure, path)


def _range_panel(axis: Axes, runs: list[RunResult], panel: Panel) -> None:
    rates = sorted({r.config.rate for r in runs})
    start, best = runs[0].accuracy[0], max(r.final_accuracy for r in runs)
    cells = np.full((len(METHODS), len(rates)), np.nan)
    for i, method in enumerate(METHODS):
        for j, rate in enumerate(rates):
            cells[i, j] = mean(r.final_accuracy for r in runs if (r.config.method, r.config.rate) == (method, rate))
    norm = TwoSlopeNorm(start, min(0.0, start - 0.1), max(best, start + 0.1))
    colours: Any = matplotlib.colormaps["RdBu"].with_extremes(bad=GRID)
    axis.imshow(cells, cmap=colours, norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        dark = not np.isnan(value) and abs(float(norm(value)) - 0.5) > 0.3
        text = "-" if np.isnan(value) else f"{value:.2f}".lstrip("0")
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=7.5)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(f"{TITLES.get(panel[0], panel[0])}\nlag {panel[1]}", fontsize=9.5, fontweight="bold")


# --- curves ---------------------------------------------------------------------------------------------------------

SHOWN = ("seq-tis", "topr", "m2po", "vcpo")  # the usual correction, and the two that come closest to VCPO or pass it


def stability_figure(results: Iterable[RunResult], lag: int, path: Path) -> None:
    """Accuracy over steps of a few methods by learning rate, sorting: the mean of the seeds, and their range."""
    runs = _at(results, ("sort", lag))
    rates = sorted({r.config.rate for r in runs})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(rates), figsize=(10, 3.1), sharey=True, squeeze=False, layout="constrained")
        for axis, rate in zip(axes[0], rates, strict=True):
            for method in SHOWN:
                here = [r for r in runs if (r.config.method, r.config.rate) == (method, rate)]
                if here:
                    curves = np.array([r.accuracy for r in here])
                    colour, width = COLOURS[method], 2.4 if method == "vcpo" else 1.5
                    axis.plot(
                        here[0].eval_steps, curves.mean(0), color=colour, linewidth=width, label=METHODS[method].title
                    )
                    axis.fill_between(
                        here[0].eval_steps, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0
                    )
            axis.axhline(runs[0].accuracy[0], color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set_title(f"learning rate {rate:g}", loc="left", fontsize=10, fontweight="bold")
            axis.set(xlabel="learner step", ylim=(0, 1))
        axes[0, 0].set_ylabel("held-out accuracy")
        axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
        seeds = len({r.config.seed for r in runs})
        title = f"Training on rollouts {lag} steps stale: sorting 12 digits, mean and range of {seeds} seeds"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        _save(figure, path)


# --- accuracy against ESS -------------------------------------------------------------------------------------------


def ess_figure(results: Iterable[RunResult], path: Path) -> None:
    """Each run a dot: the mean ESS ratio of its training, and where it ended."""
    runs = list(results)
    panels = [p for p in panels_of(runs) if p[1] > 0]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(2.7 * len(panels) + 0.5, 3.6), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            here = _at(runs, panel)
            for method in METHODS:
                dots = [r for r in here if r.config.method == method]
                if dots:
                    axis.scatter(
                        [mean(r.ess_ratio) for r in dots], [r.final_accuracy for r in dots], s=16, linewidth=0, alpha=0.85,
                        color=COLOURS[method], label=METHODS[method].title,
                    )  # fmt: skip
            axis.axhline(here[0].accuracy[0], color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean ESS / B")
            axis.set_title(
                f"{TITLES.get(panel[0], panel[0])}, lag {panel[1]}", loc="left", fontsize=10, fontweight="bold"
            )
        axes[0, 0].set_ylabel("final held-out accuracy")
        handles = {
            label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        labels = [m.title for m in METHODS.values() if m.title in handles]
        figure.legend(
            [handles[name] for name in labels], labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8
        )
        figure.suptitle("Accuracy against effective sample size, a dot a run", x=0.01, ha="left", fontweight="bold")
        _save(figure, path)


# --- before a collapse ----------------------------------------------------------------------------------------------


def collapse_figure(results: Iterable[RunResult], path: Path) -> None:
    """Accuracy, ESS and gradient norm of the runs that collapsed, in steps from the collapse; median and quartiles."""
    runs = [r for r in results if r.config.lag > 0]
    collapsed = [(r, at) for r in runs if (at := collapse_at(r)) is not None]
    survived = [r for r in runs if collapse_at(r) is None]
    names = (
        ("accuracy", "held-out accuracy"),
        ("ess_ratio", "ESS / B"),
        ("grad_norm", "gradient norm before clipping"),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
        for axis, (name, title) in zip(axes, names, strict=True):
            for task, colour in (("sort", "#d1495b"), ("add", "#8e6bbf")):
                of_task = [(r, at) for r, at in collapsed if r.config.task == task]
                if of_task:
                    label = f"{TITLES[task]}: {len(of_task)} runs"
                    _quartiles(axis, [_around(r, at, name) for r, at in of_task], colour, label)
            calm = [v for r in survived for v in getattr(r, name)]
            if calm and name != "accuracy":
                label = f"median of the {len(survived)} runs that did not"
                axis.axhline(statistics.median(calm), color=QUIET, linewidth=1, linestyle=(0, (4, 3)), label=label)
            axis.axvline(0, color=GRID, linewidth=1)
            axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
            axis.set_xlabel("learner steps from the collapse")
        axes[0].set_ylim(0, 1)
        axes[1].set_ylim(0, 1)
        axes[2].set_yscale("log")
        axes[0].legend(frameon=False, fontsize=8)
        axes[1].legend(*(part[-1:] for part in axes[1].get_legend_handles_labels()), frameon=False, fontsize=8)
        figure.suptitle("Before a collapse (lag > 0)", x=0.01, ha="left", fontweight="bold")
        note = f"collapse: from here to the run's end {COLLAPSED:g} or more below the warm start. Median and quartiles."
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=QUIET)
        _save(figure, path)


def _around(result: RunResult, at: int, name: str) -> dict[int, float]:
    """Values of a curve by steps from evaluation `at`. Those of learner steps end at their evaluation."""
    values = getattr(result, name)
    steps = result.eval_steps if name == "accuracy" else result.eval_steps[1:]
    zero = result.eval_steps[at]
    return {s - zero: v for s, v in zip(steps, values, strict=True) if -BEFORE <= s - zero <= AFTER}


def _quartiles(axis: Axes, curves: list[dict[int, float]], colour: str, label: str) -> None:
    at_least = max(1, len(curves) // 4)  # where only a few runs reach, their median says nothing of the rest
    steps = [s for s in sorted({s for c in curves for s in c}) if sum(s in c for c in curves) >= at_least]
    low, middle, high = (
        [float(np.quantile([c[s] for c in curves if s in c], q)) for s in steps] for q in (0.25, 0.5, 0.75)
    )
    axis.plot(steps, middle, color=colour, linewidth=2, label=label)
    axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
