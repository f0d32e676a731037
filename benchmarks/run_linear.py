"""The fused head's comparison: every memory mode against its bare GEMMs and its peers, verified against float64.

    python -m benchmarks.run_linear [--shape 1024,576,49152 --dtype bfloat16]

By default both shapes of docs/benchmarks.md, in bf16 and fp32. Adds linear_token_stats.jsonl and .csv to --out, by default
runs/bench/<device>.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.progress import Progress

from benchmarks.cases.head import make_inputs
from benchmarks.cases.shapes import DTYPES
from benchmarks.comparisons.head import CASES, measure, weighted_on_logits
from benchmarks.harness.clock import Rounds
from benchmarks.harness.results import Row, write_files
from benchmarks.options import Commit, Device, Out, console, device_of, folder_of, sizes
from benchmarks.report.console import HEAD, table

SHAPES = ("1024,576,49152", "512,2048,151936")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: Annotated[list[str] | None, typer.Option(help="N,H,V; may be given more than once")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=", ".join(DTYPES))] = None,
    device: Device = "",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    peers: Annotated[bool, typer.Option(help="time eager torch, torch.compile, CCE, TRL and Liger too")] = True,
    logits: Annotated[str, typer.Option(help="N,V of weighted_logp on logits")] = "256,151936",
    out: Out = None,
    commit: Commit = False,
) -> None:
    """Verify, time and write the comparison."""
    where = device_of(device)
    folder = folder_of(out, commit, where)
    wanted = [c for c in CASES if peers or c.ours]
    missing = {c.name: c.missing(where) for c in wanted}
    for name, reason in missing.items():
        if reason:
            console.print(f"[yellow]{name} left out: {reason}")
    cases = [c for c in wanted if not missing[c.name]]
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    clock = Rounds(where, repeats)
    results: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        for text in shape or SHAPES:
            for name in dtype or ("bfloat16", "float32"):
                rows, width, vocabulary = sizes(text, "--shape", 3)
                x = make_inputs(rows, width, vocabulary, DTYPES[name], where)
                of_shape = {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": name, **versions}
                measured = [{"work": "head", **r, **of_shape} for r in measure(x, cases, clock, progress)]
                title = f"linear_token_stats, N={rows} H={width} V={vocabulary} {name}, {where}"
                console.print(table(measured, title, HEAD))
                results += measured
    rows, vocabulary = sizes(logits, "--logits", 2)
    measured = weighted_on_logits(clock, rows, vocabulary, torch.bfloat16)
    console.print(table(measured, f"weighted_logp on logits, N={rows} V={vocabulary} bfloat16, {where}", HEAD))
    of_logits = {"rows": rows, "vocabulary": vocabulary, "dtype": "bfloat16", **versions}
    results += [{**r, **of_logits} for r in measured]
    write_files(results, folder, "linear_token_stats")
    console.print(f"written to {folder}")


if __name__ == "__main__":
    app()
