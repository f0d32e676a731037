"""Time to a target accuracy: two processes at their own pace against the same two taking turns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.table import Table

from .config import FINAL_EVALS, write_atomically
from .display import mean
from .paced import PacedResult

COLUMNS = (
    "task", "method", "bound", "rate", "seed", "steps", "target", "seconds_to_target", "seconds", "mean_staleness",
    "learner_waited", "sampler_waited", "final_accuracy", "seconds_curve", "accuracy_curve",
)  # fmt: skip


def _final(result: PacedResult) -> float:
    return mean(result.accuracy[-FINAL_EVALS:])


def export(results: Iterable[PacedResult], target: float, path: Path) -> None:
    """One row per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in results:
        c, reached = r.config, r.seconds_to(target)
        writer.writerow((
            c.task, c.method, c.lag, f"{c.rate:g}", c.seed, c.steps, f"{target:g}",
            "" if reached is None else f"{reached:.2f}", f"{r.seconds[-1]:.2f}", f"{mean(r.staleness):.2f}",
            f"{r.learner_waited:.3f}", f"{r.sampler_waited:.3f}", f"{_final(r):.4f}",
            " ".join(f"{s:.2f}" for s in r.seconds), " ".join(f"{a:.4f}" for a in r.accuracy),
        ))  # fmt: skip
    write_atomically(path, text.getvalue().encode())


def table(results: Iterable[PacedResult], target: float) -> Table:
    """A row per method and bound, over its seeds."""
    runs = list(results)
    out = Table(
        title=f"Time to a held-out accuracy of {target:g}, seconds",
        caption="bound: batches that the sampler may be ahead; 0: the two take turns. to target: each seed.\n"
        "waits: of learner and sampler, as parts of the time.",
        box=box.SIMPLE_HEAD,
    )
    for heading in (
        "method",
        "bound",
        "seconds to target (each seed)",
        "steps/s",
        "lag",
        "waits: learner, sampler",
        "final",
    ):
        out.add_column(heading, justify="left" if heading == "method" else "right")
    for method, bound in dict.fromkeys((r.config.method, r.config.lag) for r in runs):
        here = [r for r in runs if (r.config.method, r.config.lag) == (method, bound)]
        reached = [r.seconds_to(target) for r in here]
        out.add_row(
            method,
            str(bound),
            " ".join("never" if s is None else f"{s:.1f}" for s in reached),
            f"{mean(r.steps[-1] / r.seconds[-1] for r in here):.1f}",
            f"{mean(mean(r.staleness) for r in here):.1f}",
            f"{mean(r.learner_waited for r in here):.2f} {mean(r.sampler_waited for r in here):.2f}",
            f"{mean(_final(r) for r in here):.2f}",
        )
    return out


def markdown(path: Path) -> str:
    """The table of an exported file, as Markdown."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| method | bound | seconds to target (each seed) | steps a second | mean lag | learner, sampler waited | final |",
        "|---|---:|---|---:|---:|---|---:|",
    ]
    for method, bound in dict.fromkeys((r["method"], r["bound"]) for r in rows):
        here = [r for r in rows if (r["method"], r["bound"]) == (method, bound)]
        reached = " ".join(f"{float(r['seconds_to_target']):.1f}" if r["seconds_to_target"] else "never" for r in here)
        pace = mean(float(r["steps"]) / float(r["seconds"]) for r in here)
        lag, learner, sampler, final = (
            mean(float(r[name]) for r in here)
            for name in ("mean_staleness", "learner_waited", "sampler_waited", "final_accuracy")
        )
        lines.append(
            f"| {method} | {bound} | {reached} | {pace:.0f} | {lag:.1f} | {learner:.0%}, {sampler:.0%} | {final:.2f} |"
        )
    return "\n".join(lines)
