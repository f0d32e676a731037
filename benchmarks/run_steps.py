"""One optimizer step of GRPOTrainer, VCPOTrainer and plain loops, generation excluded, interleaved.

    python -m benchmarks.run_steps [--model llama-512]

Trainers run their own loops, held before each step. Writes steps.jsonl and .csv to --out, by default runs/bench/<device>,
beside what they hold of other models and numbers of threads. Needs TRL, and for smollm2 the model (`make smollm2`).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from benchmarks.cases.steps import COMPLETION_TOKENS, PROMPT_TOKENS, SEQUENCES, Work, small_llama, smollm2
from benchmarks.comparisons.steps import CASES, measure
from benchmarks.harness.clock import Rounds
from benchmarks.harness.results import Row, read, write_files
from benchmarks.options import Commit, Out, console, folder_of, versions
from benchmarks.report.console import STEPS, table

MODELS: dict[str, Callable[[], Work]] = {
    "llama-512": partial(small_llama, 512),
    "llama-8192": partial(small_llama, 8192),
    "smollm2": smollm2,
}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join(MODELS)}; may be given more than once")
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="by name, with its base; may be given more than once")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="of torch's operations; may be given more than once")
    ] = None,
    out: Out = None,
    commit: Commit = False,
) -> None:
    """Weigh, time and write the comparison."""
    names = [c.name for c in CASES]
    if unknown := [m for m in model or () if m not in MODELS]:
        raise typer.BadParameter(f"--model must be of {', '.join(MODELS)}, got {unknown[0]!r}")
    if unknown := [c for c in case or () if c not in names]:
        raise typer.BadParameter(f"--case must be of {', '.join(names)}, got {unknown[0]!r}")
    cases = tuple(c for c in CASES if not case or c.name in case)
    if alone := [c.name for c in cases if c.against not in {base.name for base in cases}]:
        raise typer.BadParameter(f"--case {alone[0]!r} goes with the one that it is held against")
    device = torch.device("cpu")  # what trainers do on a GPU is measured there
    folder = folder_of(out, commit, device)
    clock = Rounds(device, repeats)
    results: list[Row] = []
    warnings.simplefilter("ignore")  # of trainers that are told to run for ever
    with Progress(console=console, transient=True) as progress:
        for name, count in itertools.product(model or MODELS, threads or (1, 2)):
            torch.set_num_threads(count)
            rows, left_out = measure(MODELS[name](), clock, progress, cases)
            tokens = f"{SEQUENCES} sequences of {PROMPT_TOKENS} + {COMPLETION_TOKENS} tokens"
            console.print(table(rows, f"{rows[0]['work']}, {tokens}, fp32, {count} threads", STEPS))
            for missing, why in left_out.items():
                console.print(f"left out: {missing}: {why}")
            results += [{**row, **versions()} for row in rows]
    measured = {(row["work"], row["threads"]) for row in results}
    kept = [r for r in read(folder / "steps.jsonl") if (r["work"], r["threads"]) not in measured]
    write_files(kept + results, folder, "steps")
    console.print(f"written to {folder}")


if __name__ == "__main__":
    app()
