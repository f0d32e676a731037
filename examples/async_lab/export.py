"""Finished runs as one CSV file and back, with the machine and the versions in a JSON file beside it.

The CSV holds everything that a run's own file does, so that a fresh clone goes on from the committed one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import vcpo_kernels as vk

from .config import SERIES, RunConfig, RunResult, save_result, warm_start_of, write_atomically
from .display import mean
from .methods import METHODS
from .tasks import TASKS

MEANS = ("ess_ratio", "grad_norm", "rate_scale")
COLUMNS = (
    "task", "method", "lag", "rate", "seed", "steps", "digest", "start_accuracy", "final_accuracy", "best_accuracy",
    *(f"mean_{name}" for name in MEANS), "seconds", "backend", "accuracy_curve", *(f"{name}_curve" for name in SERIES),
)  # fmt: skip
VARIED = ("method", "lag", "rate", "seed", "task", "warm_start")


def _curve(values: Sequence[float]) -> str:
    """Values with a space between; a constant once."""
    return " ".join(f"{v:g}" for v in (values[:1] if len(set(values)) == 1 else values))


def _row(result: RunResult) -> tuple[Any, ...]:
    config = result.config
    means = (f"{mean(getattr(result, name)):.4f}" for name in MEANS)
    return (
        config.task, config.method, config.lag, f"{config.rate:g}", config.seed, config.steps, config.digest,
        f"{result.accuracy[0]:.4f}", f"{result.final_accuracy:.4f}", f"{result.best_accuracy:.4f}",
        *means, f"{result.seconds:.1f}", result.backend,
        _curve(result.accuracy), *(_curve(getattr(result, name)) for name in SERIES),
    )  # fmt: skip


def _result(row: dict[str, str]) -> RunResult | None:
    """The run of a row; None where it was made with other settings than the commands have today."""
    task = row["task"]
    try:
        config = RunConfig(
            method=row["method"],
            lag=int(row["lag"]),
            rate=float(row["rate"]),
            seed=int(row["seed"]),
            steps=int(row["steps"]),
            task=task,
            warm_start=warm_start_of(task),
        )
    except ValueError:  # a method or task that has since been renamed
        return None
    if row.get("digest") != config.digest:
        return None
    steps = [*range(0, config.steps, config.eval_every), config.steps]

    def curve(name: str, length: int) -> list[float]:
        values = [float(v) for v in row[f"{name}_curve"].split()]
        return values * length if len(values) == 1 else values

    result = RunResult(config, steps, curve("accuracy", len(steps)), backend=row["backend"])
    for name in SERIES:
        setattr(result, name, curve(name, len(steps) - 1))
    result.final_accuracy, result.best_accuracy, result.seconds = (
        float(row[name]) for name in ("final_accuracy", "best_accuracy", "seconds")
    )
    return result


def read(path: Path) -> list[RunResult]:
    """The runs of a CSV file that `export` wrote; those of other settings are left out."""
    with open(path, newline="") as file:
        return [result for row in csv.DictReader(file) if (result := _result(row)) is not None]


def restore(path: Path, folder: Path) -> int:
    """Give `folder` the files of the CSV's runs that it lacks; how many those were."""
    missing = [r for r in read(path) if not (folder / r.config.filename).exists()] if path.exists() else []
    for result in missing:
        save_result(result, folder)
    return len(missing)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def export(results: Iterable[RunResult], path: Path) -> None:
    """Write `path` (CSV, one row per run) and the same name ending in .json."""
    runs = sorted(results, key=lambda r: _place(r.config))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(map(_row, runs))
    write_atomically(path, text.getvalue().encode())
    settings = asdict(runs[0].config) if runs else {}
    for varied in VARIED:
        settings.pop(varied, None)
    tasks = list(dict.fromkeys(r.config.task for r in runs))
    metadata = {
        "runs": len(runs),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "threads_per_run": 1,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "vcpo_kernels": vk.__version__,
        },
        "settings": settings,
        "warm_starts": {task: asdict(warm_start_of(task)) for task in tasks},
        "accuracy": "sampled responses on fixed held-out prompts; final: mean of the last five evaluations",
    }
    write_atomically(path.with_suffix(".json"), (json.dumps(metadata, indent=2) + "\n").encode())


def _place(config: RunConfig) -> tuple[Any, ...]:
    tasks, methods = list(TASKS), list(METHODS)
    return tasks.index(config.task), config.lag, methods.index(config.method), config.rate, config.seed
