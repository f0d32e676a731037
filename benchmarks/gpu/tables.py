"""Markdown of committed GPU runs, for the README: python -m benchmarks.gpu.tables FOLDER. Dry runs are refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.plan import GPU
from benchmarks.gpu.results import NAME, Row, read


def gpu_folders(results: Path) -> list[Path]:
    """Folders of `results` that hold a run of `make gpu`."""
    return sorted(p.parent for p in results.glob(f"*/{NAME}"))


def environment_of(folder: Path) -> dict[str, Any]:
    environment: dict[str, Any] = json.loads((folder / "environment.json").read_text())
    if environment["plan"] != GPU.name or not environment["devices"]:
        raise ValueError(
            f"{folder} is no run on a GPU (plan {environment['plan']!r}): it does not belong among the results."
        )
    return environment


def markdown(folder: Path) -> str:
    """Targets and headline times of one run."""
    environment, rows = environment_of(folder), read(folder / NAME)
    shape, packages = GPU.headline, environment["packages"]
    lines = [
        f"{environment['devices'][0]['name']}, torch {packages['torch']}, triton {packages['triton']}; N={shape.rows}, "
        f"V={shape.vocabulary}, {shape.dtype}.",
        "",
        *report.target_table(rows, GPU),
        "",
        "| work | | ms | of the copy | of bare GEMMs |",
        "|---|---|---:|---:|---:|",
    ]
    return "\n".join(lines + [headline_line(r) for r in rows if is_headline(r)])


def is_headline(r: Row) -> bool:
    shape = (GPU.headline.rows, GPU.headline.vocabulary, GPU.headline.dtype)
    return r["kind"] == "time" and (r["rows"], r["vocabulary"], r["dtype"]) == shape


def headline_line(r: Row) -> str:
    ratios = (f"{r[f]:.2f}" if f in r else "" for f in ("of_copy", "of_bare"))
    return f"| {r['work']} | {r['name']} | {r['median_ms']:.3f} | " + " | ".join(ratios) + " |"


def main() -> None:
    """Print the tables of a result folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tables", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    print(markdown(parser.parse_args().folder))


if __name__ == "__main__":
    main()
