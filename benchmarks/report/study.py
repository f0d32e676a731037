"""The baseline study's page: tables and picture."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.harness.results import RESULTS
from benchmarks.report.pages import PICTURES
from examples import baseline_study


def _result() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / "baseline_study.json").read_text())
    return result


def tables() -> dict[str, str]:
    """As Markdown."""
    r = _result()
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


def draw() -> None:
    baseline_study.draw(_result(), PICTURES / "baseline_study.png")
