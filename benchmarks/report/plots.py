"""Pictures of benchmark results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS, PEERS = "#0b6e4f", "#9aa5b1"


def token_stats(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of milliseconds per kind of work, logarithmic, ours in colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works = [w for w in ("forward", "forward + backward") if any(r["work"] == w for r in rows)]
    figure, axes = plt.subplots(1, len(works), figsize=(5.5 * len(works), 3.4), squeeze=False)
    for axis, work in zip(axes[0], works, strict=True):
        timed = sorted((r for r in rows if r["work"] == work), key=lambda r: -r["median_ms"])
        names = [r["name"] for r in timed]
        colors = [OURS if name.startswith("vcpo") else PEERS for name in names]
        bars = axis.barh(names, [r["median_ms"] for r in timed], color=colors)
        axis.bar_label(bars, [f"{r['median_ms']:.3g} ms" for r in timed], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(right=max(r["median_ms"] for r in timed) * 3)
        axis.set_title(work, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    first = next(r for r in rows if "rows" in r)
    figure.suptitle(
        f"N={first['rows']}, V={first['vocabulary']}, {first['dtype']}: milliseconds, less is better", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
