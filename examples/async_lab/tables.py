"""The comparison's tables, from finished runs, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .config import RunResult
from .display import mean
from .methods import METHODS

COLLAPSED = 0.1  # below the warm start, from some evaluation to the end of the run


def _rates(runs: Iterable[RunResult]) -> list[float]:
    return sorted({r.config.rate for r in runs})


def _of(runs: Iterable[RunResult], method: str, rate: float) -> list[RunResult]:
    found = [r for r in runs if (r.config.method, r.config.rate) == (method, rate)]
    return sorted(found, key=lambda r: r.config.seed)


def accuracy_table(results: Iterable[RunResult], task: str, lag: int, methods: Sequence[str] = tuple(METHODS)) -> str:
    """Final accuracy by method and rate: mean (each seed)."""
    runs = [r for r in results if (r.config.task, r.config.lag) == (task, lag)]
    rates = _rates(runs)
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "---|" * len(rates)]
    for method in methods:
        cells = []
        for rate in rates:
            finals = [r.final_accuracy for r in _of(runs, method, rate)]
            each = " ".join(f"{v:.2f}" for v in finals)
            cells.append(f"{mean(finals):.2f} ({each})" if finals else "not run")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def learns(runs: Sequence[RunResult]) -> bool:
    """Whether every one of them ended above its warm start."""
    return bool(runs) and all(r.final_accuracy > r.accuracy[0] for r in runs)


def collapse_at(result: RunResult) -> int | None:
    """Index of the first of the evaluations at the run's end that are all 0.1 or more below the warm start; None: none."""
    at = None
    for i in reversed(range(len(result.accuracy))):
        if result.accuracy[i] > result.accuracy[0] - COLLAPSED:
            break
        at = i
    return at


def range_table(results: Iterable[RunResult], panels: Sequence[tuple[str, int]]) -> str:
    """The highest rate up to which every seed ends above the warm start; the best rate's mean accuracy; collapses."""
    runs = list(results)
    heads = " | ".join(f"{task}, lag {lag}" for task, lag in panels)
    lines = [f"| method | {heads} | collapsed |", "|---|" + "---|" * len(panels) + "---:|"]
    for method in METHODS:
        cells = []
        for panel in panels:
            here = [r for r in runs if (r.config.task, r.config.lag) == panel]
            by_rate = {rate: _of(here, method, rate) for rate in _rates(here)}
            reached = "none"
            for rate, of_rate in by_rate.items():
                if not learns(of_rate):
                    break
                reached = f"{rate:g}"
            finals = [mean(r.final_accuracy for r in of_rate) for of_rate in by_rate.values() if of_rate]
            cells.append(f"{reached}; {max(finals):.2f}" if finals else "not run")
        stale = [r for r in runs if (r.config.task, r.config.lag) in panels and r.config.method == method]
        fallen = sum(collapse_at(r) is not None for r in stale)
        lines.append(f"| {method} | {' | '.join(cells)} | {fallen} of {len(stale)} |")
    return "\n".join(lines)


def state(results: Iterable[RunResult], planned: Iterable[tuple[str, int, int]]) -> str:
    """How many runs there are of how many, and what is missing. planned: (task, lag, seed) of each run."""
    have: dict[tuple[str, int, int], int] = {}
    wanted: dict[tuple[str, int, int], int] = {}
    for key in ((r.config.task, r.config.lag, r.config.seed) for r in results):
        have[key] = have.get(key, 0) + 1
    for key in planned:
        wanted[key] = wanted.get(key, 0) + 1
    missing = [
        f"{count - have.get(key, 0)} of {key[0]} at lag {key[1]}, seed {key[2]}"
        for key, count in wanted.items()
        if have.get(key, 0) < count
    ]
    done = f"{sum(have.values())} of {sum(wanted.values())} runs have finished."
    return done + (f" Missing: {'; '.join(missing)}." if missing else " None is missing.")
