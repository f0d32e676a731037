"""The pictures: curves over steps, and final accuracy over learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from .config import RunResult
from .methods import METHODS

INK, QUIET, GRID = "#1f2430", "#667085", "#e4e7ec"
# Blue for the methods that the page is about; the others by kind: reds and browns weigh sequences, yellows tokens, greens
# clip or mask, greys do nothing.
COLOURS = {
    "none": "#98a2b3",
    "token-tis": "#e09f3e",
    "seq-tis": "#d1495b",
    "seq-mis": "#a05a2c",
    "icepop": "#c9a227",
    "ppo-clip": "#2a9d8f",
    "gspo": "#6a994e",
    "cispo": "#f4c95d",
    "opsm": "#1b5e55",
    "m2po": "#a7c957",
    "topr": "#f28482",
    "ess": "#17becf",
    "opob": "#8e6bbf",
    "opob-exact": "#c3a6e8",
    "vcpo": "#0b6bcb",
    "vcpo-exact": "#5fa8f5",
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": GRID,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "figure.facecolor": "white",
    "figure.dpi": 160,
}


def _band(axes: Axes, x: np.ndarray, curves: np.ndarray, colour: str, name: str) -> None:
    """Mean over seeds, curves [seeds, x], and the range from the lowest to the highest."""
    axes.plot(x, curves.mean(0), color=colour, linewidth=2, label=name, solid_capstyle="round")
    if len(curves) > 1:
        axes.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)


def _heading(figure: Figure, title: str, note: str) -> None:
    """Title at the upper left, what the colours mean below it, the settings at the foot."""
    lines = [axes.get_legend_handles_labels() for axes in figure.axes]
    # Not every panel holds every method while a grid is unfinished.
    entries = {name: handle for handles, names in lines for handle, name in zip(handles, names, strict=True)}
    labels = [method.title for method in METHODS.values() if method.title in entries]
    handles = [entries[name] for name in labels]
    columns = min(len(labels), 4)
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.4)
    legend.set_title(title, prop=FontProperties(size=13, weight="bold"))
    legend.set_alignment("left")
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=QUIET)


def _settings(runs: list[RunResult]) -> str:
    config = runs[0].config
    seeds = sorted({r.config.seed for r in runs})
    return (
        f"task {config.task}, {config.prompts} prompts x {config.samples} samples a step, AdamW, "
        f"gradient clip {config.clip:g}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    )


def curves_figure(results: Iterable[RunResult], path: Path) -> None:
    """Accuracy and ESS over steps, one column per learning rate. The runs are of one lag."""
    runs = list(results)
    rates = sorted({r.config.rate for r in runs})
    methods = [m for m in METHODS if any(r.config.method == m for r in runs)]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            2,
            len(rates),
            figsize=(max(3.3 * len(rates) + 0.6, 8.5), 5.4),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
            height_ratios=(3, 2),
        )
        for column, rate in enumerate(rates):
            top, bottom = grid[:, column]
            for method in methods:
                here = [r for r in runs if r.config.method == method and r.config.rate == rate]
                if not here:
                    continue
                colour, name = COLOURS.get(method, INK), METHODS[method].title
                _band(top, np.array(here[0].eval_steps), np.array([r.accuracy for r in here]), colour, name)
                steps = np.array(here[0].eval_steps[1:])
                _band(bottom, steps, np.array([r.ess_ratio for r in here]), colour, name)
            top.axhline(runs[0].accuracy[0], color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
            top.set_title(f"learning rate {rate:g}", loc="left", fontsize=10.5, fontweight="bold")
            top.set_ylim(0, 1)
            bottom.set_ylim(0, 1)
            bottom.set_xlabel("learner step")
        grid[0, 0].annotate(
            "warm start",
            (0.98, runs[0].accuracy[0]),
            xycoords=("axes fraction", "data"),
            xytext=(0, -11),
            ha="right",
            textcoords="offset points",
            fontsize=8,
            color=QUIET,
        )
        grid[0, 0].set_ylabel("held-out accuracy")
        grid[1, 0].set_ylabel("ESS / B")
        note = f"{_settings(runs)}. ESS / B: means between evaluations."
        _heading(figure, f"Training on rollouts {runs[0].config.lag} steps stale", note)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def rates_figure(results: Iterable[RunResult], path: Path) -> None:
    """Final accuracy over learning rate, one panel per lag: the width of each method's stable range."""
    runs = list(results)
    lags = sorted({r.config.lag for r in runs})
    methods = [m for m in METHODS if any(r.config.method == m for r in runs)]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1,
            len(lags),
            figsize=(max(3.6 * len(lags) + 0.6, 8.5), 4.2),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, lag in zip(panels[0], lags, strict=True):
            for method in methods:
                _accuracy_by_rate(axes, [r for r in runs if r.config.method == method and r.config.lag == lag], method)
            axes.axhline(runs[0].accuracy[0], color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set(xscale="log", ylim=(0, 1), xlabel="learning rate")
            axes.set_title(f"lag {lag}", loc="left", fontsize=10.5, fontweight="bold")
            rates = sorted({r.config.rate for r in runs})
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.minorticks_off()
        panels[0, 0].set_ylabel("final held-out accuracy")
        note = f"{_settings(runs)}. Dots are seeds, lines their mean; dashed: the warm start."
        _heading(figure, "How high may the learning rate be?", note)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _accuracy_by_rate(axes: Axes, runs: list[RunResult], method: str) -> None:
    rates = sorted({r.config.rate for r in runs})
    means = [np.mean([r.final_accuracy for r in runs if r.config.rate == rate]) for rate in rates]
    colour, main = COLOURS.get(method, INK), method == "vcpo"
    axes.plot(
        rates,
        means,
        color=colour,
        linewidth=2.6 if main else 1.6,
        label=METHODS[method].title,
        zorder=3 if main else 2,
    )
    axes.scatter(
        [r.config.rate for r in runs],
        [r.final_accuracy for r in runs],
        s=12,
        color=colour,
        zorder=4,
        linewidth=0,
    )
