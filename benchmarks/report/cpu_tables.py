"""The pages' tables of `make bench`: rows, the fused head, weighted_logp and per-sequence gradients on a CPU."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.machine import read_environment
from benchmarks.harness.results import RESULTS, Row, read

# Part of a page -> folder of RESULTS. "kept memory": glibc told by GLIBC_TUNABLES (mmap_threshold, trim_threshold) to
# keep what is freed, so that nobody pays for fresh pages.
TABLES = {
    "token_stats": RESULTS / "intel-r-xeon-r-processor-2-50ghz",
    "token_stats_kept_memory": RESULTS / "intel-r-xeon-r-processor-2-50ghz-kept-memory",
}
# The fused head's and the per-sequence gradients' results. Kept memory, since a first touch of freed memory costs up to 1 ms
# per MiB on this virtual machine, and bare GEMMs, which allocate nothing, are what the times are held against.
MACHINE = RESULTS / "amd-epyc-kept-memory"
FRESH = RESULTS / "amd-epyc"  # the same machine with the allocator's defaults: what a call adds to resident memory


def tables() -> dict[str, str]:
    """Each by the name of its part of a page."""
    found = {name: token_stats_table(folder) for name, folder in TABLES.items()}
    return found | {
        "head": head_table(),
        "weighted_logp": logits_table(),
        "sequence_gradients": sequence_gradients_table(),
    }


def _cpu(folder: Path) -> str:
    return read_environment(folder)["cpu"].split(",")[0]


def token_stats_table(folder: Path) -> str:
    """Milliseconds and factors of one machine's run, as Markdown. Where memory is kept, what a call adds says nothing."""
    kept = folder.name.endswith("kept-memory")
    rows = read(folder / "token_stats.jsonl")
    first = next(r for r in rows if r["work"] == "forward")
    lines = [
        f"N={first['rows']} tokens, V={first['vocabulary']}, {first['dtype']}, {first['threads']} threads, "
        f"medians of {first['repeats']}; {_cpu(folder)}, torch {first['torch']}.",
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


def head_table() -> str:
    """Forward + backward through the head: milliseconds and times the bare GEMMs, by shape and dtype, as Markdown."""
    rows = [r for r in read(MACHINE / "linear_token_stats.jsonl") if r["work"] == "head"]
    shapes = list(dict.fromkeys((r["rows"], r["width"], r["vocabulary"], r["dtype"]) for r in rows))
    first = rows[0]
    repeats = sorted({r["repeats"] for r in rows})
    lines = [
        f"{_cpu(MACHINE)}, {first['threads']} threads, torch {first['torch']}, medians of {repeats[0]}; milliseconds "
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
        [r for r in read(folder / "linear_token_stats.jsonl") if r["work"] == "on logits"]
        for folder in (MACHINE, FRESH)
    )
    for a, b in zip(kept, fresh, strict=True):
        cells = (f"{r['median_ms']:.1f} | {r['of_two_passes']:.2f}" for r in (a, b))
        lines.append(f"| {a['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sequence_gradients_table() -> str:
    """A whole step with exact norms against a plain one, as Markdown; memory from the run with fresh memory."""
    rows = read(MACHINE / "sequence_gradients.jsonl")
    fresh = read(FRESH / "sequence_gradients.jsonl")
    memory = {r["name"]: r["peak_extra_mib"] for r in fresh if _shape(r) == _shape(fresh[0])}
    shapes = list(dict.fromkeys(_shape(r) for r in rows))
    first = rows[0]
    lines = [
        f"{_cpu(MACHINE)}, {first['threads']} threads, torch {first['torch']}, medians of {first['repeats']}; milliseconds "
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


def _shape(r: Row) -> tuple[int, int, int]:
    return r["batch"], r["length"], r["prompt"]


def _shape_title(shape: tuple[int, int, int]) -> str:
    batch, length, prompt = shape
    return f"B={batch} T={length}" + f", {prompt} of them prompt" * bool(prompt)
