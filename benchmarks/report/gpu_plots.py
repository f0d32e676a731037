"""plots.png: the bandwidth of the row kernels by width, and the headline's times beside the peers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu import row_cases
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.results import Row, read

COLORS = ("#0b6e4f", "#0b6ecf", "#d1495b", "#9aa5b1")
GRID = (row_cases.FORWARD, row_cases.BACKWARD, row_cases.SCORE)


def draw(out: Path, plan: Plan) -> None:
    """One figure of what was timed; none where nothing was."""
    timed = [r for r in read(out / "results.jsonl") if r["kind"] == "time"]
    if not any(r["work"] in GRID for r in timed):
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(GRID), figsize=(5.2 * len(GRID), 7), squeeze=False)
    for column, work in enumerate(GRID):
        of_work = [r for r in timed if r["work"] == work]
        by_width(axes[0][column], [r for r in of_work if r["dtype"] == plan.headline.dtype], plan)
        axes[0][column].set_title(work, fontsize=10)
        at = (plan.headline.rows, plan.headline.vocabulary, plan.headline.dtype)
        bars(axes[1][column], [r for r in of_work if (r["rows"], r["vocabulary"], r["dtype"]) == at])
    shape = plan.headline
    dry = "DRY RUN, no GPU figure. " if plan.device == "cpu" else ""
    figure.suptitle(
        f"{dry}Share of a copy's bandwidth by width at {shape.dtype}; ms at N={shape.rows} V={shape.vocabulary}"
    )
    figure.tight_layout()
    figure.savefig(out / "plots.png", dpi=110)
    plt.close(figure)


def by_width(axis: Any, rows: list[Row], plan: Plan) -> None:
    """A line per backend and number of rows."""
    for color, backend in zip(COLORS, plan.backends, strict=False):
        for count in sorted({r["rows"] for r in rows}):
            line = sorted((r["vocabulary"], r["of_copy"]) for r in rows
                          if r["name"] == backend and r["rows"] == count and "of_copy" in r)  # fmt: skip
            if line:
                x, y = zip(*line, strict=True)
                width = 0.6 + 0.25 * len(str(count))
                axis.plot(x, y, color=color, linewidth=width, marker="o", markersize=3, label=f"{backend}, N={count}")
    axis.set_xlabel("V", fontsize=8)
    axis.legend(frameon=False, fontsize=7)


def bars(axis: Any, rows: list[Row]) -> None:
    """Milliseconds at the headline, slowest on top."""
    rows = sorted(rows, key=lambda r: -r["median_ms"])
    names = [r["name"] for r in rows]
    drawn = axis.barh(names, [r["median_ms"] for r in rows], color=[COLORS[3 if r.get("peer") else 0] for r in rows])
    axis.bar_label(drawn, [f"{r['median_ms']:.3g} ms" for r in rows], padding=3, fontsize=7)
    axis.tick_params(labelsize=7)
