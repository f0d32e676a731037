"""The comparison: token_stats against eager torch and torch.compile, verified against float64, timed in one run.

    python -m benchmarks.run [--rows 256 --vocabulary 151936 --dtype bfloat16]

Writes token_stats.jsonl, token_stats.csv, token_stats.png and environment.txt to --out, by default runs/bench/<device>.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress

from benchmarks.cases.rows import make_inputs
from benchmarks.cases.shapes import DTYPES
from benchmarks.comparisons.rows import run_cases, run_layouts
from benchmarks.harness.clock import Rounds
from benchmarks.harness.results import write_files
from benchmarks.options import Commit, Device, Out, console, device_of, folder_of, versions
from benchmarks.report import plots
from benchmarks.report.console import ROWS, table

app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[int, typer.Option(min=8, help="N, tokens; a multiple of 4")] = 256,
    vocabulary: Annotated[int, typer.Option(min=2, help="V")] = 151936,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    device: Device = "",
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    peers: Annotated[bool, typer.Option(help="time eager torch and torch.compile too")] = True,
    out: Out = None,
    commit: Commit = False,
) -> None:
    """Verify, time and write the comparison."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if rows % 4:
        raise typer.BadParameter(f"--rows must be a multiple of 4, got {rows}")
    where = device_of(device)
    folder = folder_of(out, commit, where)
    x = make_inputs(rows, vocabulary, DTYPES[dtype], where)
    clock = Rounds(where, repeats)
    with Progress(console=console, transient=True) as progress:
        results = run_cases(x, clock, peers, progress)
    results += run_layouts(x, clock)
    shape = {"rows": rows, "vocabulary": vocabulary, "dtype": dtype}
    results = [{**r, **shape, **versions()} for r in results]
    write_files(results, folder, "token_stats")
    plots.token_stats(results, folder / "token_stats.png")
    console.print(table(results, f"token_stats, N={rows} V={vocabulary} {dtype}, {where}, medians of {repeats}", ROWS))
    console.print(f"written to {folder}")


if __name__ == "__main__":
    app()
