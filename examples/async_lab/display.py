"""The terminal: live progress of every run, and tables of what came out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .config import RunConfig, RunResult
from .methods import METHODS
from .workers import Message


def label(config: RunConfig) -> str:
    """A run in a few words."""
    return f"{config.method:<10} {config.rate:<6g} lag {config.lag:<3} seed {config.seed}"


class LiveRuns:
    """Progress bars: the total, and one line per run that has begun."""

    def __init__(self, configs: list[RunConfig], already: int, console: Console) -> None:
        self.configs = configs
        self.rows: dict[int, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.total = self.progress.add_task("[bold]runs", total=len(configs), completed=already, state="")
        # A grid has more runs than a terminal has lines; the demonstration's stay in view.
        self.keep_finished = len(configs) <= 12

    def __enter__(self) -> LiveRuns:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, message: Message) -> None:
        """Show what a worker has told."""
        config = self.configs[message.run]
        if message.run not in self.rows:
            self.rows[message.run] = self.progress.add_task(label(config), total=config.steps, state="")
        row = self.rows[message.run]
        if message.error is not None:
            self.progress.update(row, state="[red]failed[/red]")
            return
        state = f"acc {message.accuracy:.2f} ESS {message.ess_ratio:.2f}"
        self.progress.update(row, completed=message.step, state=state)
        if message.finished:
            self.progress.stop_task(row)
            self.progress.update(row, visible=self.keep_finished)
            self.progress.advance(self.total)


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    items = list(values)
    return statistics.fmean(items) if items else math.nan


def runs_table(results: Iterable[RunResult]) -> Table:
    """One row per run, narrow enough for a terminal of 80 columns."""
    table = Table(
        title="Accuracy of sampled responses on held-out prompts",
        caption="final: last five evaluations. ESS/B, grad norm, rate scale: mean of all steps.",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    columns = ("method", "lag", "rate", "seed", "start", "final", "best", "ESS/B", "grad", "scale", "time")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for result in results:
        config = result.config
        table.add_row(
            config.method,
            str(config.lag),
            f"{config.rate:g}",
            str(config.seed),
            f"{result.accuracy[0]:.2f}",
            f"[bold]{result.final_accuracy:.2f}[/bold]",
            f"{result.best_accuracy:.2f}",
            f"{mean(result.ess_ratio):.2f}",
            f"{mean(result.grad_norm):.2f}",
            f"{mean(result.rate_scale):.2f}",
            f"{result.seconds:.0f} s",
        )
    return table


def grid_tables(results: Iterable[RunResult]) -> list[Table]:
    """Final accuracy per lag: methods down, rates across, the mean over seeds and each seed's own."""
    runs = list(results)
    tables = []
    for lag in sorted({r.config.lag for r in runs}):
        here = [r for r in runs if r.config.lag == lag]
        rates = sorted({r.config.rate for r in here})
        table = Table(title=f"Final accuracy at lag {lag}: mean (each seed)")
        table.add_column("method")
        for rate in rates:
            table.add_column(f"rate {rate:g}", justify="right")
        for method, entry in METHODS.items():
            cells = [[r for r in here if r.config.method == method and r.config.rate == rate] for rate in rates]
            if any(cells):
                table.add_row(entry.title, *map(_cell, cells))
        tables.append(table)
    return tables


def _cell(runs: list[RunResult]) -> str:
    if not runs:
        return "not run"
    finals = [r.final_accuracy for r in sorted(runs, key=lambda r: r.config.seed)]
    return f"[bold]{mean(finals):.2f}[/bold] ({' '.join(f'{value:.2f}' for value in finals)})"
