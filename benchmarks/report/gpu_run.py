"""report.md, results.csv and the summary: failures first, then targets, then everything that was measured."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from benchmarks.gpu.plan import Plan
from benchmarks.gpu.results import Row, read, write_csv
from benchmarks.gpu.targets import MISSED, NOT_MEASURED, REACHED, evaluate

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


def target_table(rows: list[Row], plan: Plan) -> list[str]:
    lines = ["| work | | required | measured | by | |", "|---|---|---:|---:|---|---|"]
    for t, m, status in evaluate(rows, plan):
        sign = "<=" if t.at_most else ">="
        value, name = (f"{m.value:.4g}", m.name) if m else ("", "")
        lines.append(f"| {t.work} | {t.quantity} | {sign} {t.required:g} | {value} | {name} | {status} |")
    return lines


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


def write(out: Path, plan: Plan) -> None:
    """report.md and results.csv from results.jsonl as it stands."""
    rows = read(out / "results.jsonl")
    write_csv(rows, out / "results.csv")
    environment = out / "environment.json"
    devices = json.loads(environment.read_text())["devices"] if environment.exists() else []
    counts = ", ".join(f"{n} {name.lower()}" for name, n in sorted(test_counts(out)[0].items())) or "none ran"
    lines = ["# GPU run", ""]
    if plan.device == "cpu":
        lines += [f"**{NO_FIGURE}**", ""]
    lines += ["## Failures", "", *bullets(failures(rows, out)), "", "## Targets", "", *target_table(rows, plan), ""]
    lines += ["## Phases", ""]
    lines += [f"- {r['phase']}: {r['status']}, {r['seconds']} s" for r in rows if r["kind"] == "phase"]
    lines += [f"- tests: {counts}", "", "## Left out", "", *bullets(left_out(rows)), ""]
    lines += ["## Machine", "", *bullets([json.dumps(d) for d in devices]), "", "## Results", "", *result_tables(rows)]
    (out / "report.md").write_text("\n".join(lines))


def summary(out: Path, plan: Plan) -> tuple[str, bool]:
    """A short text for the terminal, and whether nothing failed."""
    rows = read(out / "results.jsonl")
    failed = failures(rows, out)
    judged = evaluate(rows, plan)
    status = Counter(s for *_, s in judged)
    lines = [NO_FIGURE] if plan.device == "cpu" else []
    lines += [f"failures: {len(failed)}", *bullets([line[:200] for line in failed[:15]]), ""]
    lines += [f"targets: {status[REACHED]} reached, {status[MISSED]} missed, "
              f"{status[NOT_MEASURED]} not measured", *target_table(rows, plan), "",
              f"report: {out / 'report.md'}"]  # fmt: skip
    return "\n".join(lines)[:12000], not failed
