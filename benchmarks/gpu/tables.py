"""Markdown of committed GPU runs, for docs/benchmarks.md: python -m benchmarks.gpu.tables FOLDER. Dry runs are refused."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu import targets
from benchmarks.gpu.plan import GPU
from benchmarks.report import gpu_run


def markdown(folder: Path) -> str:
    """Targets and headline times of one run."""
    return gpu_run.markdown(folder, GPU.name, GPU.headline.fields(), targets.table(gpu_run.rows_of(folder), GPU))


def of_all(results: Path) -> str:
    """What `make gpu` measured, a device after the other."""
    return "\n\n".join(map(markdown, gpu_run.folders(results))) or "No run of `make gpu` is among the results yet."


def main() -> None:
    """Print the tables of a result folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tables", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    print(markdown(parser.parse_args().folder))


if __name__ == "__main__":
    main()
