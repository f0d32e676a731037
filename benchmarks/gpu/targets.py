"""The figures that must be reached on an H100, as data, and whether a run's results reach them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cases import rows as row_cases
from benchmarks.cases import rows_peers, sequences
from benchmarks.cases.head import HEAD
from benchmarks.gpu.plan import Plan
from benchmarks.harness.results import Row

REACHED, MISSED, NOT_MEASURED = "reached", "missed", "not measured"
DRY_RUN = "dry run"  # a value, and no figure


@dataclass(frozen=True)
class Measured:
    """A value, and whose it is."""

    value: float
    name: str


@dataclass(frozen=True)
class Target:
    """at_most: the value must not be above `required`; otherwise not below it."""

    work: str
    quantity: str
    required: float
    at_most: bool
    find: Callable[[list[Row], Plan], Measured | None]

    def status(self, measured: Measured | None) -> str:
        if measured is None:
            return NOT_MEASURED
        good = measured.value <= self.required if self.at_most else measured.value >= self.required
        return REACHED if good else MISSED


def _times(rows: list[Row], plan: Plan, work: str) -> list[Row]:
    """Timed rows of a work at the headline shape; sequence works have a shape of their own."""
    timed = [r for r in rows if r["kind"] == "time" and r["work"] == work]
    if any("batch" in r for r in timed):
        return timed
    return [r for r in timed if plan.headline.fields().items() <= r.items()]


def best(work: str, field: str, most: bool = False, ending: str = "") -> Callable[[list[Row], Plan], Measured | None]:
    """The least (or largest) value of a field among the package's own rows: the registry picks the backend that wins."""

    def find(rows: list[Row], plan: Plan) -> Measured | None:
        own = [r for r in _times(rows, plan, work) if not r.get("peer") and r["name"].endswith(ending)]
        found = [Measured(float(r[field]), r["name"]) for r in own if r.get(field) is not None]
        pick = max if most else min
        return pick(found, key=lambda m: m.value) if found else None

    return find


def times_faster(work: str, peer: str) -> Callable[[list[Row], Plan], Measured | None]:
    """The peer's time over our best."""

    def find(rows: list[Row], plan: Plan) -> Measured | None:
        ours = best(work, "median_ms")(rows, plan)
        theirs = [r["median_ms"] for r in _times(rows, plan, work) if r["name"] == peer]
        return Measured(theirs[0] / ours.value, ours.name) if ours and theirs else None

    return find


def thousandfold(find: Callable[[list[Row], Plan], Measured | None]) -> Callable[[list[Row], Plan], Measured | None]:
    """Milliseconds as microseconds."""

    def wider(rows: list[Row], plan: Plan) -> Measured | None:
        found = find(rows, plan)
        return found and Measured(found.value * 1e3, found.name)

    return wider


def captured(rows: list[Row], plan: Plan) -> Measured | None:
    """1 where a replayed graph gave what the call gave, 0 where it failed."""
    tried = [r for r in rows if r.get("work") == sequences.GRAPH and r["kind"] in ("time", "failure")]
    return Measured(float(tried[-1]["kind"] == "time"), tried[-1]["name"]) if tried else None


COPY = "of the bandwidth of a copy"
TARGETS = (
    Target(row_cases.FORWARD, COPY, 0.92, False, best(row_cases.FORWARD, "of_copy", most=True)),
    Target(row_cases.FORWARD, "ms", 0.85, True, best(row_cases.FORWARD, "median_ms")),
    Target(row_cases.BACKWARD, f"{COPY}, 3 NV", 0.90, False, best(row_cases.BACKWARD, "of_copy", most=True)),
    Target(row_cases.BACKWARD, "times Liger's sequence path", 1.3, False,
           times_faster(row_cases.BACKWARD, rows_peers.LIGER_SEQUENCE)),
    Target(row_cases.SCORE, f"{COPY}, 2 NV", 0.85, False, best(row_cases.SCORE, "of_copy", most=True)),
    Target(f"{HEAD}, fast", "times three bare GEMMs", 1.10, True, best(HEAD, "of_bare", ending=", fast")),
    Target(f"{HEAD}, lean", "times four bare GEMMs", 1.10, True, best(HEAD, "of_bare", ending=", lean")),
    Target(sequences.COEFFICIENTS, "us", 40, True, thousandfold(best(sequences.COEFFICIENTS, "median_ms"))),
    Target(sequences.LAUNCH, "us of the host", 60, True, best(sequences.LAUNCH, "host_us")),
    Target(sequences.GRAPH, "captured and replayed", 1, False, captured),
)  # fmt: skip


def evaluate(rows: list[Row], plan: Plan) -> list[tuple[Target, Measured | None, str]]:
    """Every target with what was measured and whether that reaches it."""
    found = [(t, t.find(rows, plan)) for t in TARGETS]
    return [(t, m, DRY_RUN if plan.dry and m else t.status(m)) for t, m in found]


def table(rows: list[Row], plan: Plan) -> list[str]:
    """The verdicts as Markdown."""
    lines = ["| work | | required | measured | by | |", "|---|---|---:|---:|---|---|"]
    for t, m, status in evaluate(rows, plan):
        sign = "<=" if t.at_most else ">="
        value, name = (f"{m.value:.4g}", m.name) if m else ("", "")
        lines.append(f"| {t.work} | {t.quantity} | {sign} {t.required:g} | {value} | {name} | {status} |")
    return lines


def counts(rows: list[Row], plan: Plan) -> str:
    """How many are reached, in words."""
    found = Counter(status for *_, status in evaluate(rows, plan))
    return ", ".join(f"{found[status]} {status}" for status in (REACHED, MISSED, NOT_MEASURED))
