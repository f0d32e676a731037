"""The fused head's comparison: every memory mode against its bare GEMMs and its peers, verified against float64.

    python -m benchmarks.run_linear [--shape 1024,576,49152 --dtype bfloat16]

Adds linear_token_stats.jsonl and .csv to --out: by default both shapes of the README, in bf16 and fp32.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import vcpo_kernels as vk
from benchmarks import run, token_stats_cases
from benchmarks.linear_cases import (
    CASES,
    BareGemms,
    LinearCase,
    LinearInputs,
    half_masked,
    make_inputs,
    oracle,
    relative_error,
)
from benchmarks.timing import Stopwatch, Timing, peak_extra_mib
from vcpo_kernels import env

SHAPES = ("1024,576,49152", "512,2048,151936")
# A result that is not right is not timed. bf16: what rounding the logits costs, three times over. Of ours and peers'.
ERROR_BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 5e-6}

app = typer.Typer(add_completion=False)
console = Console(width=120)


def extra_mib(case: LinearCase, x: LinearInputs, device: torch.device) -> float | None:
    """Peak beyond inputs and gradients."""
    peak = peak_extra_mib(device, lambda: case.run(x))
    gradients = x.hidden.numel() + (0 if "frozen" in case.name else x.weight.numel())
    return None if peak is None else max(0.0, peak - gradients * x.hidden.element_size() / 2**20)


def measure(x: LinearInputs, cases: list[LinearCase], watch: Stopwatch, progress: Progress) -> list[dict[str, Any]]:
    """Verify and weigh each case, then time all of them and the bare GEMMs in turn."""
    halved = half_masked(x)
    inputs = {case.name: halved if case.masked else x for case in cases}
    exact = {False: oracle(x), True: oracle(halved)}
    rows: list[dict[str, Any]] = []
    task = progress.add_task("verifying", total=len(cases))
    for case in cases:
        progress.update(task, description=f"verifying {case.name}")
        error = relative_error(case.run(inputs[case.name]), exact[case.masked])
        if not error <= ERROR_BOUND[x.hidden.dtype]:
            raise SystemExit(f"{case.name}: relative error {error:.2e} over the bound {ERROR_BOUND[x.hidden.dtype]}")
        extra = extra_mib(case, inputs[case.name], watch.device)
        rows.append({"name": case.name, "bare": case.bare, "max_error": error, "peak_extra_mib": extra})
        progress.advance(task)
    del exact
    gemms = BareGemms(x)
    calls = [partial(gemms.run, n) for n in (2, 3, 4)] + [partial(c.run, inputs[c.name]) for c in cases]
    progress.update(task, description=f"timing {len(calls)} calls, {watch.repeats} rounds", total=None)
    timings = watch.measure_in_turn(calls)
    progress.remove_task(task)
    bare = dict(zip((2, 3, 4), timings, strict=False))
    bare_rows = [{"name": f"{n} bare GEMMs", "bare": n, **times(bare[n])} for n in bare]
    ours = min(t.median_ms for c, t in zip(cases, timings[3:], strict=True) if c.name in FULL)
    for row, timing in zip(rows, timings[3:], strict=True):
        row |= times(timing)
        row["of_bare"] = round(timing.median_ms / bare[row["bare"]].median_ms, 3)
        if not row["name"].startswith("vcpo_kernels"):
            row["times_slower"] = round(timing.median_ms / ours, 2)
    return bare_rows + rows


FULL = ("vcpo_kernels, fast", "vcpo_kernels, lean")


def times(timing: Timing) -> dict[str, Any]:
    """A timing's fields of a result row."""
    return {
        "median_ms": round(timing.median_ms, 2),
        "fastest_ms": round(timing.fastest_ms, 2),
        "slowest_ms": round(timing.slowest_ms, 2),
        "repeats": timing.repeats,
    }


def weighted_on_logits(watch: Stopwatch, rows: int, vocabulary: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """weighted_logp against token_stats, forward and backward, out of place and in place."""
    x = token_stats_cases.make_inputs(rows, vocabulary, dtype, watch.device)
    scratch = x.logits.clone()

    def gradient(inplace: bool, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = (scratch if inplace else x.logits).detach().requires_grad_()
        return torch.autograd.grad(loss_of(leaf.view_as(leaf)), leaf)[0]

    def two_passes(inplace: bool) -> torch.Tensor:
        return gradient(inplace, lambda z: (vk.token_stats(z, x.token_ids, inplace_backward=inplace).logp * x.g).sum())

    def one_pass(inplace: bool) -> torch.Tensor:
        return gradient(inplace, lambda z: vk.weighted_logp(z, x.token_ids, x.g, inplace=inplace)[0])

    calls = [partial(f, inplace) for inplace in (False, True) for f in (two_passes, one_pass)]
    names = [f"{f}{place}" for place in ("", ", in place") for f in ("token_stats", "weighted_logp")]
    exact = token_stats_cases.oracle(x)[1]
    errors = []
    for name, call in zip(names, calls, strict=True):
        scratch.copy_(x.logits)
        errors.append(float((call().double() - exact).norm() / exact.norm()))
        if not errors[-1] <= run.ERROR_BOUND[token_stats_cases.BACKWARD]:
            raise SystemExit(f"{name}: relative error {errors[-1]:.2e} of its gradient is over the bound")
    del exact
    timings = watch.measure_in_turn(calls)
    base = (timings[0], timings[0], timings[2], timings[2])
    return [
        {
            "name": n,
            "work": "on logits",
            **times(t),
            "of_two_passes": round(t.median_ms / b.median_ms, 3),
            "max_error": e,
        }
        for n, t, b, e in zip(names, timings, base, errors, strict=True)
    ]


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The results as people read them."""
    out = Table(title=title)
    columns = {
        "name": "", "median_ms": "ms", "of_bare": "of bare GEMMs", "times_slower": "times ours",
        "of_two_passes": "of token_stats", "peak_extra_mib": "extra MiB", "max_error": "error",
    }  # fmt: skip
    shown = [c for c in columns if any(r.get(c) is not None for r in rows)]
    for column in shown:
        out.add_column(columns[column], justify="left" if column == "name" else "right", no_wrap=column != "name")
    for row in rows:
        cells = [row.get(c) for c in shown]
        out.add_row(*("" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    return out


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """JSON lines, CSV and environment."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "linear_token_stats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / "linear_token_stats.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    (out / "environment.txt").write_text("".join(f"{name}: {value}\n" for name, value in env.report()))


@app.command()
def main(
    shape: Annotated[list[str] | None, typer.Option(help="N,H,V; may be given more than once")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=", ".join(run.DTYPES))] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    peers: Annotated[bool, typer.Option(help="time eager torch, torch.compile, CCE, TRL and Liger too")] = True,
    logits: Annotated[str, typer.Option(help="N,V of weighted_logp on logits")] = "256,151936",
    out: Annotated[Path | None, typer.Option(help="folder; default benchmarks/results/<device>")] = None,
) -> None:
    """Verify, time and write the comparison."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = [c for c in CASES if peers or c.name.startswith("vcpo_kernels")]
    missing = {c.name: c.missing() for c in wanted}
    for name, reason in missing.items():
        if reason:
            console.print(f"[yellow]{name} left out: {reason}")
    cases = [c for c in wanted if not missing[c.name]]
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    watch = Stopwatch(where, repeats)
    results: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        for text in shape or SHAPES:
            for name in dtype or ("bfloat16", "float32"):
                rows, width, vocabulary = sizes(text, "--shape", 3)
                x = make_inputs(rows, width, vocabulary, run.DTYPES[name], where)
                of_shape = {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": name, **versions}
                measured = [{"work": "head", **r, **of_shape} for r in measure(x, cases, watch, progress)]
                console.print(table(measured, f"linear_token_stats, N={rows} H={width} V={vocabulary} {name}, {where}"))
                results += measured
    rows, vocabulary = sizes(logits, "--logits", 2)
    measured = weighted_on_logits(watch, rows, vocabulary, torch.bfloat16)
    console.print(table(measured, f"weighted_logp on logits, N={rows} V={vocabulary} bfloat16, {where}"))
    results += [{**r, "rows": rows, "vocabulary": vocabulary, "dtype": "bfloat16", **versions} for r in measured]
    target = out or Path("benchmarks/results") / run.device_slug(where)
    write(results, target)
    console.print(f"written to {target}")


def sizes(text: str, option: str, count: int, least: int = 1) -> list[int]:
    """Integers from "1024,576,49152"."""
    parts = text.split(",")
    if len(parts) != count or not all(p.strip().isdigit() and int(p) >= least for p in parts):
        raise typer.BadParameter(f"{option} must be {count} integers >= {least} with commas between, got {text!r}")
    return [int(p) for p in parts]


if __name__ == "__main__":
    app()
