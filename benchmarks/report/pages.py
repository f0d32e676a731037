"""The pages that hold what the results say, and how a part of them is filled."""

from __future__ import annotations

import re
from pathlib import Path

import typer

README, BENCHMARKS = Path("README.md"), Path("docs/benchmarks.md")
LAB, STUDY = Path("docs/async_lab.md"), Path("docs/baseline_study.md")
PARALLEL = Path("docs/parallel.md")
PICTURES = Path("docs/figures")


def filled(text: str, parts: dict[str, str]) -> str:
    """Markdown with each `<!-- name -->` ... `<!-- /name -->` replaced by its part."""
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise typer.BadParameter(f"no <!-- {name} --> part to fill")
        text = pattern.sub(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)  # type: ignore[misc]
    return text
