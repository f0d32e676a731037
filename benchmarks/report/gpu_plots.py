"""plots.png: the bandwidth of the row kernels by width, and the headline's times beside the peers'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.results import NAME, Row, read

COLORS = ("#0b6e4f", "#0b6ecf", "#d1495b", "#9aa5b1")


def draw(out: Path, headline: Row, works: Sequence[str], backends: Sequence[str], dry: bool) -> None:
    """One figure of what was timed, a column per work; none where nothing was. headline: rows, vocabulary and dtype."""
    timed = [r for r in read(out / NAME) if r["kind"] == "time"]
    if not any(r["work"] in works for r in timed):
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(works), figsize=(5.2 * len(works), 7), squeeze=False)
    for column, work in enumerate(works):
        of_work = [r for r in timed if r["work"] == work]
        by_width(axes[0][column], [r for r in of_work if r["dtype"] == headline["dtype"]], backends)
        axes[0][column].set_title(work, fontsize=10)
        bars(axes[1][column], [r for r in of_work if headline.items() <= r.items()])
    figure.suptitle(
        f"{'DRY RUN, no GPU figure. ' * dry}Share of a copy's bandwidth by width at {headline['dtype']}; "
        f"ms at N={headline['rows']} V={headline['vocabulary']}"
    )
    figure.tight_layout()
    figure.savefig(out / "plots.png", dpi=110)
    plt.close(figure)


def by_width(axis: Any, rows: list[Row], backends: Sequence[str]) -> None:
    """A line per backend and number of rows."""
    for color, backend in zip(COLORS, backends, strict=False):
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
