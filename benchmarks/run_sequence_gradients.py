"""Exact per-sequence gradient norms: SequenceGradients against a plain step and against one trajectory at a time.

    python -m benchmarks.run_sequence_gradients [--shape 16,256,0]

Every way is verified against float64 per-sequence gradients first. Adds sequence_gradients.jsonl and .csv to --out, by
default runs/bench/<device>. Needs transformers for the model, a Llama of four layers.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress

from benchmarks.cases.sequence_gradients import LAYERS, VOCABULARY, WIDTH, make_batch
from benchmarks.comparisons.sequence_gradients import measure
from benchmarks.harness.clock import Rounds
from benchmarks.harness.results import Row, write_files
from benchmarks.options import Commit, Device, Out, console, device_of, folder_of, sizes, versions
from benchmarks.report.console import SEQUENCE_GRADIENTS, table

SHAPES = ("16,256,0", "16,256,128", "4,1024,0")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: Annotated[
        list[str] | None, typer.Option(help="B,T,prompt tokens among the T; may be given more than once")
    ] = None,
    device: Device = "",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    out: Out = None,
    commit: Commit = False,
) -> None:
    """Verify, time and write the comparison."""
    where = device_of(device)
    folder = folder_of(out, commit, where)
    clock = Rounds(where, repeats)
    results: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        for text in shape or SHAPES:
            batch, length, prompt = sizes(text, "--shape", 3, least=0)
            rows = measure(make_batch(batch, length, prompt, where), clock, progress)
            title = f"B={batch} T={length}, {prompt} of them prompt, Llama {LAYERS} x {WIDTH}, V={VOCABULARY}, fp32, {where}"
            console.print(table(rows, title, SEQUENCE_GRADIENTS))
            results += [{**r, "batch": batch, "length": length, "prompt": prompt, **versions()} for r in rows]
    write_files(results, folder, "sequence_gradients")
    console.print(f"written to {folder}")


if __name__ == "__main__":
    app()
