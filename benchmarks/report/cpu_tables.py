"""The tables and pictures of the README and docs, made from the committed result files and nothing else: `make figures`.

    python -m benchmarks.figures [--check]

--check changes nothing and fails where a page does not hold what the results say.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu import tables as gpu_tables
from examples import baseline_study
from examples.async_lab import export as async_lab_export
from examples.async_lab import race
from examples.async_lab.cli import paper_configs
from examples.async_lab.config import RunResult
from examples.async_lab.pictures import collapse_figure, ess_figure, panels_of, range_figure, stability_figure
from examples.async_lab.tables import accuracy_table, range_table, state

RESULTS = Path("benchmarks/results")
README, LAB, STUDY = Path("README.md"), Path("docs/async_lab.md"), Path("docs/baseline_study.md")
# Part of the README -> folder of RESULTS. "kept memory": glibc told by GLIBC_TUNABLES (mmap_threshold, trim_threshold) to
# keep what is freed, so that nobody pays for fresh pages.
TABLES = {
    "token_stats": "intel-r-xeon-r-processor-2-50ghz",
    "token_stats_kept_memory": "intel-r-xeon-r-processor-2-50ghz-kept-memory",
}
# The fused head's and the per-sequence gradients' results. Kept memory, since a first touch of freed memory costs up to 1 ms
# per MiB on this virtual machine, and bare GEMMs, which allocate nothing, are what the times are held against.
MACHINE = "amd-epyc-kept-memory"
FRESH = "amd-epyc"  # the same machine with the allocator's defaults: what a call adds to resident memory
PICTURES = Path("docs/figures")
STUDY_PICTURE = PICTURES / "baseline_study.png"
# What the README shows of the lab: sorting at this lag, the usual corrections, VCPO and its parts, and its closest rivals.
LAG = 32
LAB_METHODS = ("none", "token-tis", "seq-tis", "m2po", "topr", "ess", "opob", "vcpo")

app = typer.Typer(add_completion=False)


def token_stats_table(folder: Path) -> str:
    """Milliseconds and factors of one machine's run, as Markdown. Where memory is kept, what a call adds says nothing."""
    kept = folder.name.endswith("kept-memory")
    rows = [json.loads(line) for line in (folder / "token_stats.jsonl").read_text().splitlines()]
    environment = dict(line.split(": ", 1) for line in (folder / "environment.txt").read_text().splitlines())
    first = next(r for r in rows if r["work"] == "forward")
    lines = [
        f"N={first['rows']} tokens, V={first['vocabulary']}, {first['dtype']}, {first['threads']} threads, "
        f"medians of {first['repeats']}; {environment['cpu'].split(',')[0]}, torch {first['torch']}.",
        "",
        "| work | | ms | times faster with vcpo_kernels |" + " memory beyond inputs, MiB |" * (not kept),
        "|---|---|---:|---:|" + "---:|" * (not kept),
    ]
    for work in ("forward", "forward + backward"):
        of_work = [r for r in rows if r["work"] == work]
        ours = next(r for r in of_work if r["name"] == "vcpo_kernels")["median_ms"]
        for r in of_work:
            factor = "" if r["name"].startswith("vcpo_kernels") else f"{r['median_ms'] / ours:.1f}"
            memory = "" if r["peak_extra_mib"] is None else f"{r['peak_extra_mib']:.0f}"
            lines.append(f"| {work} | {r['name']} | {r['median_ms']:.1f} | {factor} |" + f" {memory} |" * (not kept))
    return "\n".join(lines)


def _results(folder: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / folder / f"{name}.jsonl").read_text().splitlines()]


def _machine(folder: str) -> str:
    environment = (RESULTS / folder / "environment.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in environment)["cpu"].split(",")[0]


def head_table() -> str:
    """Forward + backward through the head: milliseconds and times the bare GEMMs, by shape and dtype, as Markdown."""
    rows = [r for r in _results(MACHINE, "linear_token_stats") if r["work"] == "head"]
    shapes = list(dict.fromkeys((r["rows"], r["width"], r["vocabulary"], r["dtype"]) for r in rows))
    first = rows[0]
    repeats = sorted({r["repeats"] for r in rows})
    lines = [
        f"{_machine(MACHINE)}, {first['threads']} threads, torch {first['torch']}, medians of {repeats[0]}; milliseconds "
        "(times the bare GEMMs that the work needs).",
        "",
        "| | bare GEMMs | " + " | ".join(f"N={n} H={h} V={v} {d}" for n, h, v, d in shapes) + " |",
        "|---|---:|" + "---:|" * len(shapes),
    ]
    for name in dict.fromkeys(r["name"] for r in rows):
        of_name = {(r["rows"], r["width"], r["vocabulary"], r["dtype"]): r for r in rows if r["name"] == name}
        cells = []
        for shape in shapes:
            r = of_name[shape]
            cells.append(f"{r['median_ms']:.0f}" + (f" ({r['of_bare']:.2f})" if "of_bare" in r else ""))
        bare = next(iter(of_name.values()))["bare"]
        lines.append(f"| {name} | {bare} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def logits_table() -> str:
    """weighted_logp against token_stats, with both allocators, as Markdown."""
    lines = ["| | ms, kept memory | of token_stats | ms, fresh memory | of token_stats |", "|---|---:|---:|---:|---:|"]
    kept, fresh = (
        [r for r in _results(folder, "linear_token_stats") if r["work"] == "on logits"] for folder in (MACHINE, FRESH)
    )
    for a, b in zip(kept, fresh, strict=True):
        cells = (f"{r['median_ms']:.1f} | {r['of_two_passes']:.2f}" for r in (a, b))
        lines.append(f"| {a['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sequence_gradients_table() -> str:
    """A whole step with exact norms against a plain one, as Markdown; memory from the run with fresh memory."""
    rows = _results(MACHINE, "sequence_gradients")
    fresh = _results(FRESH, "sequence_gradients")
    memory = {r["name"]: r["peak_extra_mib"] for r in fresh if _shape(r) == _shape(fresh[0])}
    shapes = list(dict.fromkeys(_shape(r) for r in rows))
    first = rows[0]
    lines = [
        f"{_machine(MACHINE)}, {first['threads']} threads, torch {first['torch']}, medians of {first['repeats']}; milliseconds "
        "(times the plain step with the same head).",
        "",
        "| | "
        + " | ".join(_shape_title(s) for s in shapes)
        + f" | MiB beyond gradients, {_shape_title(_shape(fresh[0]))} |",
        "|---|" + "---:|" * (len(shapes) + 1),
    ]
    for name in dict.fromkeys(r["name"] for r in rows):
        of_name = {_shape(r): r for r in rows if r["name"] == name}
        cells = [f"{of_name[s]['median_ms']:.0f} ({of_name[s]['of_plain']:.2f})" for s in shapes]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {memory[name]:.0f} |")
    return "\n".join(lines)


def _shape(r: dict[str, Any]) -> tuple[int, int, int]:
    return r["batch"], r["length"], r["prompt"]


def _shape_title(shape: tuple[int, int, int]) -> str:
    batch, length, prompt = shape
    return f"B={batch} T={length}" + f", {prompt} of them prompt" * bool(prompt)


def study_tables() -> dict[str, str]:
    """The baseline study's two tables, as Markdown."""
    r = json.loads((RESULTS / "baseline_study.json").read_text())
    lines = ["| norm | all samples | within a prompt, median (least to most) |", "|---|---:|---:|"]
    for name, pooled in r["correlation_pooled"].items():
        within = sorted(r["correlation_within"][name])
        median = within[len(within) // 2]
        lines.append(f"| {name} | {pooled:.2f} | {median:.2f} ({within[0]:.2f} to {within[-1]:.2f}) |")
    variances = [
        "| baseline | variance, held out | in sample | prompts better than the mean, held out |",
        "|---|---:|---:|---:|",
    ]
    mean = {k: r[f"variance_{k}"]["mean"] for k in ("held_out", "in_sample")}
    for name, values in r["variance_held_out"].items():
        held_out, in_sample = (sum(r[f"variance_{k}"][name]) / sum(mean[k]) for k in mean)
        better = sum(a < b for a, b in zip(values, mean["held_out"], strict=True))
        count = "" if name == "mean" else f"{better} of {len(values)}"
        variances.append(f"| {name} | {held_out:.3f} | {in_sample:.3f} | {count} |")
    baselines = ["| | " + " | ".join(r["baselines"]) + " |", "|---|" + "---:|" * len(r["baselines"])]
    for i in range(r["informative"]):
        cells = (f"{values[i]:.2f}" for values in r["baselines"].values())
        baselines.append(f"| prompt {i + 1} | " + " | ".join(cells) + " |")
    return {"correlation": "\n".join(lines), "variance": "\n".join(variances), "baselines": "\n".join(baselines)}


def lab_parts(runs: list[RunResult]) -> dict[str, str]:
    """The lab page's tables and its line on what has run, as Markdown."""
    panels = panels_of(runs)
    parts = {f"{task} lag {lag}": accuracy_table(runs, task, lag) for task, lag in panels}
    planned = ((c.task, c.lag, c.seed) for c in paper_configs())
    raced = RESULTS / "async_lab_race.csv"
    parts["race"] = race.markdown(raced) if raced.exists() else "Not measured on an idle machine yet."
    return parts | {"range": range_table(runs, [p for p in panels if p[1] > 0]), "state": state(runs, planned)}


def filled(text: str, parts: dict[str, str]) -> str:
    """Markdown with each `<!-- name -->` ... `<!-- /name -->` replaced by its part."""
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise typer.BadParameter(f"no <!-- {name} --> part to fill")
        text = pattern.sub(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)  # type: ignore[misc]
    return text


def gpu_table() -> str:
    """What `make gpu` measured, a device after the other."""
    folders = gpu_tables.gpu_folders(RESULTS)
    return "\n\n".join(map(gpu_tables.markdown, folders)) or "No run of `make gpu` is among the results yet."


@app.command()
def main(check: Annotated[bool, typer.Option(help="fail instead of writing")] = False) -> None:
    """Fill the pages from the results, and draw the README's picture."""
    tables = {name: token_stats_table(RESULTS / folder) for name, folder in TABLES.items()}
    tables |= {"head": head_table(), "weighted_logp": logits_table(), "sequence_gradients": sequence_gradients_table()}
    tables["gpu"] = gpu_table()
    runs = async_lab_export.read(RESULTS / "async_lab.csv")
    pages = {
        README: filled(README.read_text(), {"async_lab": accuracy_table(runs, "sort", LAG, LAB_METHODS), **tables}),
        STUDY: filled(STUDY.read_text(), study_tables()),
        LAB: filled(LAB.read_text(), lab_parts(runs)),
    }
    if check:
        for path, wanted in pages.items():
            if wanted != path.read_text():
                raise SystemExit(f"{path} does not hold what benchmarks/results says; run `make figures`.")
        return
    for path, wanted in pages.items():
        path.write_text(wanted)
    stability_figure(runs, LAG, PICTURES / "stability.png")
    range_figure(runs, PICTURES / "async_lab_range.png")
    ess_figure(runs, PICTURES / "async_lab_ess.png")
    collapse_figure(runs, PICTURES / "async_lab_collapse.png")
    baseline_study.draw(json.loads((RESULTS / "baseline_study.json").read_text()), STUDY_PICTURE)


if __name__ == "__main__":
    app()
