"""A run of `make gpu` as text: report.md, the summary (failures, then targets, then everything), docs/benchmarks.md's table.

Targets come as lines: what must be reached is no business of a report.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness.results import NAME, Row, read, write_csv

NO_FIGURE = "This was a dry run on a CPU at sizes that say nothing. No figure of it is a GPU figure; do not commit it."
TEST_LINE = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
SHOWN = 40  # failures and left-out cases of each kind


def test_counts(out: Path) -> tuple[Counter[str], list[str]]:
    """Outcomes in tests.log and the tests that failed; of a run that was killed, those that had ended."""
    log = out / "tests.log"
    counts: Counter[str] = Counter()
    failed: dict[str, None] = {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        found = TEST_LINE.search(line)
        name = re.search(r"tests/\S+::\S+", line)
        if found is None or name is None or line.startswith(("FAILED", "ERROR")):  # the summary repeats them
            continue
        counts[found[1]] += 1
        if found[1] in ("FAILED", "ERROR"):
            failed[name[0]] = None
    return counts, list(failed)


def failures(rows: list[Row], out: Path) -> list[str]:
    """Everything that went wrong, a line each."""
    lines = []
    for r in rows:
        if r["kind"] == "phase" and r["status"] != "passed":
            lines.append(f"phase {r['phase']} {r['status']} after {r['seconds']} s: {last_line(r['tail'])}")
    lines += [f"test {name}" for name in test_counts(out)[1]]
    lines += [f"{title(r)}: {r['reason']}" for r in rows if r["kind"] == "failure"]
    return lines


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def title(r: Row) -> str:
    return f"{r['work']}, {r['name']}, N={r.get('rows')} V={r.get('vocabulary')} {r.get('dtype')}"


def result_tables(rows: list[Row]) -> list[str]:
    """One table per kind of work."""
    timed = [r for r in rows if r["kind"] == "time"]
    lines: list[str] = []
    for work in dict.fromkeys(r["work"] for r in timed):
        lines += [f"### {work}", "", "| | N | V | dtype | ms | spread | GB/s | of the copy | of bare GEMMs | host us | error |",
                  "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
        for r in (r for r in timed if r["work"] == work):
            cells = [r["name"], r["rows"], r["vocabulary"], r["dtype"], r["median_ms"], r["spread"]]
            cells += [r.get(f) for f in ("gb_per_s", "of_copy", "of_bare", "host_us", "max_error")]
            shown = ("" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
            lines.append("| " + " | ".join(shown) + " |")
        lines.append("")
    return lines


def left_out(rows: list[Row]) -> list[str]:
    """Reasons, each with how many cases it took and the first of them."""
    groups: dict[str, list[Row]] = {}
    for r in rows:
        if r["kind"] == "left out":
            groups.setdefault(r["reason"], []).append(r)
    return [
        f"{len(g)} x {reason}: {title(g[0])}" + (" and others" if len(g) > 1 else "") for reason, g in groups.items()
    ]


def bullets(lines: list[str]) -> list[str]:
    more = [f"- and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"- {line}" for line in lines[:SHOWN]] + more or ["None."]


def rows_of(out: Path) -> list[Row]:
    return read(out / NAME)


def write(out: Path, targets: list[str], dry: bool) -> None:
    """report.md and results.csv from results.jsonl as it stands."""
    rows = rows_of(out)
    write_csv(rows, out / "results.csv")
    environment = out / "environment.json"
    devices = json.loads(environment.read_text())["devices"] if environment.exists() else []
    counts = ", ".join(f"{n} {name.lower()}" for name, n in sorted(test_counts(out)[0].items())) or "none ran"
    lines = ["# GPU run", ""]
    if dry:
        lines += [f"**{NO_FIGURE}**", ""]
    lines += ["## Failures", "", *bullets(failures(rows, out)), "", "## Targets", "", *targets, ""]
    lines += ["## Phases", ""]
    lines += [f"- {r['phase']}: {r['status']}, {r['seconds']} s" for r in rows if r["kind"] == "phase"]
    lines += [f"- tests: {counts}", "", "## Left out", "", *bullets(left_out(rows)), ""]
    lines += ["## Machine", "", *bullets([json.dumps(d) for d in devices]), "", "## Results", "", *result_tables(rows)]
    (out / "report.md").write_text("\n".join(lines))


def summary(out: Path, targets: list[str], dry: bool) -> tuple[str, bool]:
    """A short text for the terminal, and whether nothing failed."""
    failed = failures(rows_of(out), out)
    lines = [NO_FIGURE] if dry else []
    lines += [f"failures: {len(failed)}", *bullets([line[:200] for line in failed[:15]]), "", *targets, ""]
    lines += [f"report: {out / 'report.md'}"]
    return "\n".join(lines)[:12000], not failed


# --- committed runs --------------------------------------------------------------------------------------------------


def folders(results: Path) -> list[Path]:
    """Folders of `results` that hold a run of `make gpu`."""
    return sorted(p.parent for p in results.glob(f"*/{NAME}"))


def environment_of(folder: Path, plan: str) -> dict[str, Any]:
    environment: dict[str, Any] = json.loads((folder / "environment.json").read_text())
    if environment["plan"] != plan or not environment["devices"]:
        raise ValueError(
            f"{folder} is no run on a GPU (plan {environment['plan']!r}): it does not belong among the results."
        )
    return environment


def markdown(folder: Path, plan: str, headline: Row, targets: list[str]) -> str:
    """Targets and headline times of one run. headline: rows, vocabulary and dtype."""
    environment = environment_of(folder, plan)
    packages = environment["packages"]
    lines = [
        f"{environment['devices'][0]['name']}, torch {packages['torch']}, triton {packages['triton']}; "
        f"N={headline['rows']}, V={headline['vocabulary']}, {headline['dtype']}.",
        "",
        *targets,
        "",
        "| work | | ms | of the copy | of bare GEMMs |",
        "|---|---|---:|---:|---:|",
    ]
    timed = (r for r in rows_of(folder) if r["kind"] == "time" and headline.items() <= r.items())
    return "\n".join(lines + [headline_line(r) for r in timed])


def headline_line(r: Row) -> str:
    ratios = (f"{r[f]:.2f}" if f in r else "" for f in ("of_copy", "of_bare"))
    return f"| {r['work']} | {r['name']} | {r['median_ms']:.3f} | " + " | ".join(ratios) + " |"
