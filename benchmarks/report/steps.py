"""The README's table of optimizer steps, from `python -m benchmarks.run_steps --commit`."""

from __future__ import annotations

from benchmarks.harness.machine import read_environment
from benchmarks.harness.results import RESULTS, Row, read

MACHINE = RESULTS / "amd-epyc"


def steps_table() -> str:
    """Milliseconds by threads and times the base; memory and times the base's, by model and case, as Markdown."""
    rows = read(MACHINE / "steps.jsonl")
    threads = sorted({r["threads"] for r in rows})
    heads = "".join(f" ms, {n} thread{'s' * (n > 1)} |" for n in threads)
    lines = [
        f"An optimizer step, generation excluded, fp32, medians of {rows[0]['repeats']} interleaved rounds; "
        f"{read_environment(MACHINE)['cpu'].split(',')[0]}, torch {rows[0]['torch']}. In brackets: times the line held against, "
        "the first of its kind.",
        "",
        f"| | |{heads} memory beyond the model, MiB |",
        "|---|---|" + "---:|" * (len(threads) + 1),
    ]
    for work in dict.fromkeys(r["work"] for r in rows):
        for name in dict.fromkeys(r["name"] for r in rows if r["work"] == work):
            of_threads = [next(r for r in rows if (r["work"], r["name"], r["threads"]) == (work, name, n)) for n in threads]
            times = "".join(f" {r['median_ms']:.0f}{_factor(r, 'of_base')} |" for r in of_threads)
            memory = of_threads[0]["peak_extra_mib"]
            shown = "" if memory is None else f"{memory:.0f}{_factor(of_threads[0], 'of_base_memory')}"
            lines.append(f"| {work} | {name} |{times} {shown} |")
    return "\n".join(lines)


def _factor(row: Row, field: str) -> str:
    return "" if row["name"] == row["against"] or row[field] is None else f" ({row[field]:.2f})"
