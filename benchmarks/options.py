"""What the commands of `make bench` have in common: options, sizes and where results go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.harness import machine
from benchmarks.harness.results import MEASURED, RESULTS, Row

Device = Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")]
Out = Annotated[Path | None, typer.Option(help="folder; default runs/bench/<device>")]
Commit = Annotated[
    bool, typer.Option("--commit", help="write to benchmarks/results/<device>, over what is committed there")
]

console = Console(width=120)


def device_of(option: str) -> torch.device:
    return torch.device(option or ("cuda" if torch.cuda.is_available() else "cpu"))


def sizes(text: str, option: str, count: int, least: int = 1) -> list[int]:
    """Integers from "1024,576,49152"."""
    parts = text.split(",")
    if len(parts) != count or not all(p.strip().isdigit() and int(p) >= least for p in parts):
        raise typer.BadParameter(f"{option} must be {count} integers >= {least} with commas between, got {text!r}")
    return [int(p) for p in parts]


def versions() -> Row:
    """Of every result row."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def folder_of(out: Path | None, commit: bool, device: torch.device) -> Path:
    """Where results go. To be asked before measuring: it refuses --out beside --commit."""
    if commit and out is not None:
        raise typer.BadParameter("--out and --commit name two folders; give one of them")
    return out or (RESULTS if commit else MEASURED) / machine.slug(device)
