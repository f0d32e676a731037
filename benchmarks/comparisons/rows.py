"""The comparison: token_stats against eager torch and torch.compile, verified against float64, timed in one run.

    python -m benchmarks.run [--rows 256 --vocabulary 151936 --dtype bfloat16]

Writes token_stats.jsonl, token_stats.csv, token_stats.png and environment.txt to --out.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import vcpo_kernels as vk
from benchmarks import plots
from benchmarks.timing import Stopwatch, peak_extra_mib
from benchmarks.token_stats_cases import BACKWARD, CASES, FORWARD, Case, Inputs, make_inputs, max_error, oracle
from vcpo_kernels import env
from vcpo_kernels.core import registry

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# A result that is not right is not timed. Ours: the package's own bounds. Eager torch in bf16 has no bound to keep.
ERROR_BOUND = {FORWARD: registry.BACKENDS["native"].relative_error, BACKWARD: 4e-3}

app = typer.Typer(add_completion=False)
console = Console(width=120)


def device_slug(device: torch.device) -> str:
    """A folder name for the machine: its GPU, or its CPU with the instruction set."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else dict(env.report())["cpu"].split(",")[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def variants(device: torch.device) -> list[tuple[str, str]]:
    """(suffix, instruction set) of each variant of our kernels to time; the first is the default."""
    if device.type != "cpu":
        return [("", "")]
    from vcpo_kernels import _native

    chosen = _native.isa_chosen()
    others = [isa for isa in reversed(_native.isa_available()) if isa != chosen]
    return [("", chosen)] + [(f" ({isa})", isa) for isa in others]


def layouts(x: Inputs) -> list[tuple[str, Inputs, Inputs]]:
    """Non-contiguous views, each with the contiguous rows it is to be compared with: (name, view, copy)."""
    n, v = x.logits.shape
    views = {
        "all but the last token": (x.logits.view(4, n // 4, v)[:, :-1], x.token_ids.view(4, -1)[:, :-1]),
        "every second row": (x.logits[::2], x.token_ids[::2]),
    }
    return [
        (
            name,
            Inputs(logits, ids, torch.ones(ids.shape, device=logits.device)),
            Inputs(logits.contiguous(), ids, torch.ones(ids.shape, device=logits.device)),
        )
        for name, (logits, ids) in views.items()
    ]


def measure_case(case: Case, x: Inputs, want: Any, watch: Stopwatch, copy_gb_per_s: float, isa: str) -> dict[str, Any]:
    """Verify, time and weigh one case."""
    inplace = case.name.startswith("vcpo_kernels, in place")
    first = replace(x, logits=x.logits.clone()) if inplace else x
    error = max_error(case, case.run(first), want)
    ours = case.name.startswith("vcpo_kernels")
    if ours and not error <= ERROR_BOUND[case.work]:
        raise typer.Exit(_fail(f"{case.name}, {case.work}: error {error:.2e} over the bound {ERROR_BOUND[case.work]}"))
    if inplace:  # repeated on its own output, which is as good as any logits for timing
        x = first
    timing = watch.measure(lambda: case.run(x))
    bytes_moved = case.floor_nv * x.logits.numel() * x.logits.element_size()
    gb_per_s = bytes_moved / timing.median_ms / 1e6
    return {
        "name": case.name,
        "work": case.work,
        "isa": isa,
        "median_ms": round(timing.median_ms, 3),
        "fastest_ms": round(timing.fastest_ms, 3),
        "slowest_ms": round(timing.slowest_ms, 3),
        "repeats": timing.repeats,
        "floor_nv": case.floor_nv,
        "gb_per_s": round(gb_per_s, 2),
        "fraction_of_copy": round(gb_per_s / copy_gb_per_s, 3),
        "peak_extra_mib": peak_extra_mib(watch.device, lambda: case.run(x)),
        "max_error": error,
    }


def _fail(message: str) -> int:
    console.print(f"[red]{message}")
    return 1


def run_cases(x: Inputs, watch: Stopwatch, peers: bool, progress: Progress) -> list[dict[str, Any]]:
    """Every case, our kernels in every variant."""
    want = oracle(x)
    copy = watch.copy_gb_per_s(x.logits)
    todo = [(c, s, i) for c in CASES for s, i in (variants(watch.device) if c.name == "vcpo_kernels" else [("", "")])]
    todo = [t for t in todo if peers or t[0].name.startswith("vcpo_kernels")]
    task = progress.add_task("timing", total=len(todo))
    rows = [{"name": "copy", "work": "copy", "gb_per_s": round(copy, 2), "floor_nv": 2}]
    for case, suffix, isa in todo:
        progress.update(task, description=f"{case.name}{suffix}, {case.work}")
        named = replace(case, name=case.name + suffix)
        with instruction_set(isa):
            rows.append(measure_case(named, x, want, watch, copy, isa))
        progress.advance(task)
    return rows


@contextlib.contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Run our CPU kernels in one of their variants; "" leaves them as they are."""
    if not isa:
        yield
        return
    from vcpo_kernels import _native

    before = _native.isa_chosen()
    _native.isa_choose(isa)
    try:
        yield
    finally:
        _native.isa_choose(before)


def run_layouts(x: Inputs, watch: Stopwatch) -> list[dict[str, Any]]:
    """Views against contiguous copies of the same rows."""
    rows = []
    for name, view, copied in layouts(x):
        calls = [functools.partial(_forward, logits, view.token_ids) for logits in (view.logits, copied.logits)]
        timings = watch.measure_in_turn(calls)
        for label, call, timing in zip((name, f"{name}, contiguous"), calls, timings, strict=True):
            rows.append(
                {
                    "name": label,
                    "work": "layout",
                    "median_ms": round(timing.median_ms, 3),
                    "fastest_ms": round(timing.fastest_ms, 3),
                    "peak_extra_mib": peak_extra_mib(watch.device, call),
                    "repeats": timing.repeats,
                }
            )
    return rows


@torch.no_grad()
def _forward(logits: torch.Tensor, token_ids: torch.Tensor) -> vk.TokenStats:
    return vk.token_stats(logits, token_ids)


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The results as people read them."""
    out = Table(title=title)
    columns = ("work", "name", "median_ms", "gb_per_s", "fraction_of_copy", "peak_extra_mib", "max_error")
    titles = ("work", "name", "ms", "GB/s", "of copy", "extra MiB", "error")
    for column, heading in zip(columns, titles, strict=True):
        text = column in ("work", "name")
        out.add_column(heading, justify="left" if text else "right", no_wrap=not text)
    for row in rows:
        cells = [row.get(c) for c in columns]
        out.add_row(*("" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    return out


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """JSON lines, CSV, picture and environment."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "token_stats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / "token_stats.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    (out / "environment.txt").write_text("".join(f"{name}: {value}\n" for name, value in env.report()))
    plots.token_stats(rows, out / "token_stats.png")


@app.command()
def main(
    rows: Annotated[int, typer.Option(min=8, help="N, tokens; a multiple of 4")] = 256,
    vocabulary: Annotated[int, typer.Option(min=2, help="V")] = 151936,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    peers: Annotated[bool, typer.Option(help="time eager torch and torch.compile too")] = True,
    out: Annotated[Path | None, typer.Option(help="folder; default benchmarks/results/<device>")] = None,
) -> None:
    """Verify, time and write the comparison."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if rows % 4:
        raise typer.BadParameter(f"--rows must be a multiple of 4, got {rows}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    x = make_inputs(rows, vocabulary, DTYPES[dtype], where)
    watch = Stopwatch(where, repeats)
    with Progress(console=console, transient=True) as progress:
        results = run_cases(x, watch, peers, progress)
    results += run_layouts(x, watch)
    shape = {"rows": rows, "vocabulary": vocabulary, "dtype": dtype, "threads": torch.get_num_threads()}
    results = [{**r, **shape, "torch": torch.__version__} for r in results]
    target = out or Path("benchmarks/results") / device_slug(where)
    write(results, target)
    console.print(table(results, f"token_stats, N={rows} V={vocabulary} {dtype}, {where}, medians of {repeats}"))
    console.print(f"written to {target}")


if __name__ == "__main__":
    app()
