"""A grid's results as one CSV file, with the machine and the versions in a JSON file beside it."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import vcpo_kernels as vk

from .config import RunResult, write_atomically
from .display import mean

COLUMNS = (
    "task", "method", "lag", "rate", "seed", "steps", "start_accuracy", "final_accuracy", "best_accuracy",
    "mean_ess_ratio", "mean_grad_norm", "mean_rate_scale", "seconds", "backend", "accuracy_curve",
)  # fmt: skip


def _row(result: RunResult) -> tuple[Any, ...]:
    config = result.config
    curve = " ".join(f"{value:.3f}" for value in result.accuracy)
    means = (mean(values) for values in (result.ess_ratio, result.grad_norm, result.rate_scale))
    return (
        config.task, config.method, config.lag, f"{config.rate:g}", config.seed, config.steps,
        f"{result.accuracy[0]:.4f}", f"{result.final_accuracy:.4f}", f"{result.best_accuracy:.4f}",
        *(f"{value:.4f}" for value in means), f"{result.seconds:.1f}", result.backend, curve,
    )  # fmt: skip


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def export(results: Iterable[RunResult], path: Path) -> None:
    """Write `path` (CSV, one row per run) and the same name ending in .json."""
    runs = sorted(results, key=lambda r: (r.config.lag, r.config.rate, r.config.method, r.config.seed))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(map(_row, runs))
    write_atomically(path, text.getvalue().encode())
    settings = asdict(runs[0].config) if runs else {}
    for varied in ("method", "lag", "rate", "seed"):
        settings.pop(varied, None)
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
        "accuracy": "sampled responses on fixed held-out prompts; final: mean of the last five evaluations",
    }
    write_atomically(path.with_suffix(".json"), (json.dumps(metadata, indent=2) + "\n").encode())
