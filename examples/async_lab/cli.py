"""The commands: demo, run, grid, paper, race, report."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from . import race
from .config import RunConfig, RunResult, all_results, warm_start_of
from .display import LiveRuns, grid_tables, label, runs_table
from .export import export, restore
from .figures import curves_figure, rates_figure
from .methods import METHODS
from .paced import PacedResult, run_paced
from .pictures import panels_of, range_figure
from .workers import Outcome, finished_before, prepare_warm_starts, run_all

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Asynchronous RL on small tasks: stale rollouts against the learning rate.",
    pretty_exceptions_enable=False,
)
console = Console()
T = TypeVar("T")

OutOption = Annotated[Path, typer.Option("--out", help="Folder of results; finished runs in it are not run again.")]
SeedsOption = Annotated[str, typer.Option(help="Seeds, separated by commas.")]
StepsOption = Annotated[int, typer.Option(help="Learner steps per run.")]
TaskOption = Annotated[str, typer.Option(help="Name in tasks.TASKS.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Processes, one thread each.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Run finished runs again.")]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="Also write all runs to this file.")]
DEFAULT_OUT = Path("runs/async_lab")
COMMITTED = Path("benchmarks/results/async_lab.csv")
# The paper's comparison: task, lags and number of seeds; every method at every rate.
PAPER_RATES = (1e-4, 3e-4, 1e-3)
PAPER = (("sort", (32, 8, 128, 0), 3), ("add", (32, 0), 2))


def _list(name: str, text: str, convert: Callable[[str], T], wanted: str) -> list[T]:
    """Comma-separated values, as typed after --name."""
    try:
        values = [convert(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--{name} must be {wanted} separated by commas; got {text!r}.") from error
    return list(dict.fromkeys(values))


def _configs(
    methods: list[str], lags: list[int], rates: list[float], seeds: list[int], steps: int, task: str
) -> list[RunConfig]:
    """Every combination. Seeds vary slowest, so that an interrupted grid has its first seeds whole."""
    try:
        return [
            RunConfig(
                method=method,
                lag=lag,
                rate=rate,
                seed=seed,
                steps=steps,
                task=task,
                warm_start=warm_start_of(task),
            )
            for seed, lag, rate, method in itertools.product(seeds, lags, rates, methods)
        ]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _execute(configs: list[RunConfig], out: Path, workers: int, force: bool) -> list[RunResult]:
    """Run them with live progress; ends the program where it was interrupted or a run failed."""
    try:
        before = {} if force else finished_before(configs, out)
        with console.status("warm start: supervised training, kept for later runs"):
            prepare_warm_starts((c.warm_start for i, c in enumerate(configs) if i not in before), out)
        already = len(before)
        if already:
            console.print(f"{already} of {len(configs)} runs have finished before (--force runs them again).")
        with LiveRuns(configs, already, console) as live:
            outcome = run_all(configs, out, workers, force, live.update)
    except KeyboardInterrupt:
        outcome = Outcome(interrupted=True)
    for run, error in outcome.errors.items():
        console.print(f"[red]failed:[/red] {label(configs[run])}\n{error}", highlight=False)
    if outcome.interrupted:
        done = len(finished_before(configs, out))
        console.print(f"Stopped. {done} of {len(configs)} runs are in {out}; the same command without --force resumes.")
        raise typer.Exit(130)
    if outcome.errors:
        raise typer.Exit(1)
    return [outcome.results[i] for i in range(len(configs))]


@app.command()
def demo(
    out: OutOption = DEFAULT_OUT,
    seeds: SeedsOption = "0",
    lag: Annotated[int, typer.Option(help="Steps by which rollouts are stale.")] = 32,
    rates: Annotated[str, typer.Option(help="Learning rates, separated by commas.")] = "1e-4,3e-4,1e-3",
    steps: StepsOption = 400,
    workers: WorkersOption = 2,
    force: ForceOption = False,
) -> None:
    """Sequence truncated IS and VCPO side by side over three learning rates: a table and a picture."""
    configs = _configs(
        ["seq-tis", "vcpo"],
        [lag],
        _list("rates", rates, float, "numbers"),
        _list("seeds", seeds, int, "whole numbers"),
        steps,
        "sort",
    )
    results = _execute(configs, out, workers, force)
    picture = out / "demo.png"
    curves_figure(results, picture)
    console.print(runs_table(results))
    console.print(f"Curves: {picture}")


@app.command()
def run(
    method: Annotated[str, typer.Option(help="Name in methods.METHODS.")] = "vcpo",
    lag: Annotated[int, typer.Option(help="Steps by which rollouts are stale.")] = 32,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seeds: SeedsOption = "0",
    steps: StepsOption = 400,
    task: TaskOption = "sort",
    workers: WorkersOption = 1,
    out: OutOption = DEFAULT_OUT,
    force: ForceOption = False,
) -> None:
    """One setting, over some seeds."""
    configs = _configs([method], [lag], [rate], _list("seeds", seeds, int, "whole numbers"), steps, task)
    console.print(runs_table(_execute(configs, out, workers, force)))


@app.command()
def grid(
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas.")
    ] = "seq-tis,vcpo,none,ess,opob,token-tis,seq-mis",
    lags: Annotated[str, typer.Option(help="Lags, separated by commas.")] = "8,32,128",
    rates: Annotated[str, typer.Option(help="Learning rates, separated by commas.")] = "1e-4,3e-4,1e-3",
    seeds: SeedsOption = "0,1,2",
    steps: StepsOption = 400,
    task: TaskOption = "sort",
    workers: WorkersOption = 2,
    out: OutOption = DEFAULT_OUT,
    csv: CsvOption = None,
    force: ForceOption = False,
) -> None:
    """Methods x lags x learning rates x seeds: a table per lag, a picture, and the curves per lag."""
    configs = _configs(
        _list("methods", methods, str, "names"),
        _list("lags", lags, int, "whole numbers"),
        _list("rates", rates, float, "numbers"),
        _list("seeds", seeds, int, "whole numbers"),
        steps,
        task,
    )
    _report(_execute(configs, out, workers, force), out, csv)


def paper_configs() -> list[RunConfig]:
    """Every run of the comparison. Seeds vary slowest: an interrupted one has the first seeds whole."""
    methods = list(METHODS)
    return [
        config
        for seed in range(max(seeds for _, _, seeds in PAPER))
        for task, lags, seeds in PAPER
        if seed < seeds
        for lag in lags
        for config in _configs(methods, [lag], list(PAPER_RATES), [seed], 400, task)
    ]


@app.command()
def paper(
    workers: WorkersOption = 2,
    out: OutOption = DEFAULT_OUT,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            help="Runs in this file are not run again; all are written to it. "
            f"Default: those of {COMMITTED}, and paper.csv in --out.",
        ),
    ] = None,
) -> None:
    """Every method of the comparison, both tasks: goes on from the committed results."""
    source, csv = csv or COMMITTED, csv or out / "paper.csv"
    restored = restore(source, out)
    if restored:
        console.print(f"{restored} runs taken from {source}.")
    configs = paper_configs()
    try:
        _execute(configs, out, workers, force=False)
    finally:
        finished = list(finished_before(configs, out).values())
        if finished:
            export(finished, csv)
            range_figure(finished, out / "range.png")
        console.print(f"{len(finished)} of {len(configs)} runs: {csv}; picture: {out / 'range.png'}")
    for task, lag in panels_of(finished):
        for table in grid_tables(r for r in finished if (r.config.task, r.config.lag) == (task, lag)):
            console.print(f"{task}:", table)


@app.command("race")
def race_command(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "seq-tis,vcpo",
    bounds: Annotated[
        str, typer.Option(help="Batches that the sampler may be ahead, separated by commas; 0: the two take turns.")
    ] = "0,4,16",
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    target: Annotated[float, typer.Option(help="Held-out accuracy to reach.")] = 0.65,
    seeds: SeedsOption = "0,1,2",
    steps: StepsOption = 400,
    task: TaskOption = "sort",
    out: OutOption = DEFAULT_OUT,
    csv: CsvOption = None,
) -> None:
    """A sampler and a learner process at their own pace: time to a target. Wants two idle cores."""
    configs = _configs(
        _list("methods", methods, str, "names"),
        _list("bounds", bounds, int, "whole numbers"),
        [rate],
        _list("seeds", seeds, int, "whole numbers"),
        steps,
        task,
    )
    results: list[PacedResult] = []
    try:
        with console.status("") as status:
            prepare_warm_starts((config.warm_start for config in configs), out)
            for config in configs:

                def show(step: int, seconds: float, config: RunConfig = config) -> None:
                    if step % 10 == 0:
                        done = f"{len(results)} of {len(configs)} runs"
                        status.update(f"{done}; {label(config)}: step {step}, {seconds:.1f} s")

                results.append(run_paced(config, out, show))
    except KeyboardInterrupt:
        console.print(f"Stopped. {len(results)} of {len(configs)} runs were measured; nothing is resumed.")
        raise typer.Exit(130) from None
    console.print(race.table(results, target))
    if csv is not None:
        race.export(results, target, csv)
        console.print(f"All runs: {csv}")


@app.command()
def report(
    out: OutOption = DEFAULT_OUT,
    steps: StepsOption = 400,
    task: TaskOption = "sort",
    csv: CsvOption = None,
) -> None:
    """What has finished so far, of whatever commands: the grid's tables and pictures, gaps named."""
    results = [r for r in all_results(out) if r.config.steps == steps and r.config.task == task]
    if not results:
        raise typer.BadParameter(f"--out must hold finished runs of {steps} steps on {task!r}; {out} has none.")
    _report(results, out, csv)


def _report(results: list[RunResult], out: Path, csv: Path | None) -> None:
    rates_figure(results, out / "grid.png")
    for lag in sorted({result.config.lag for result in results}):
        curves_figure([r for r in results if r.config.lag == lag], out / f"grid-lag{lag}.png")
    for table in grid_tables(results):
        console.print(table)
    console.print(f"Pictures: {out / 'grid.png'} and one per lag beside it")
    if csv is not None:
        export(results, csv)
        console.print(f"All runs: {csv}")
