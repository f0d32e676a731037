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
        f"An optimizer step, generation excluded, fp32, medians of {_range([r['repeats'] for r in rows])} interleaved rounds; "
        f"{read_environment(MACHINE)['cpu'].split(',')[0]}, torch {rows[0]['torch']}. In brackets: times the line above that "
        "it is held against.",
        "",
        f"| | |{heads} memory beyond the model, MiB |",
        "|---|---|" + "---:|" * (len(threads) + 1),
    ]
    for work in dict.fromkeys(r["work"] for r in rows):
        for name in dict.fromkeys(r["name"] for r in rows if r["work"] == work):
            found = {r["threads"]: r for r in rows if (r["work"], r["name"]) == (work, name)}
            times = "".join(f" {_cell(found.get(n), 'median_ms', 'of_base')} |" for n in threads)
            memory = _cell(found[max(found)], "peak_extra_mib", "of_base_memory")
            lines.append(f"| {work} | {name} |{times} {memory} |")
    return "\n".join(lines)


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _cell(row: Row | None, field: str, of_base: str) -> str:
    if row is None or row[field] is None:
        return ""
    factor = "" if row["name"] == row["against"] or row[of_base] is None else f" ({row[of_base]:.2f})"
    return f"{row[field]:.0f}{factor}"
