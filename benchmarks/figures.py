"""The tables and pictures of the README and docs, made from the committed result files and nothing else: `make figures`.

    python -m benchmarks.figures [--check]

--check changes nothing and fails where a page does not hold what the results say.
"""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.gpu import tables as gpu_tables
from benchmarks.harness.results import RESULTS
from benchmarks.report import cpu_tables, lab, scale_plan, steps, study
from benchmarks.report.pages import BENCHMARKS, LAB, PARALLEL, README, STUDY, filled

app = typer.Typer(add_completion=False)


@app.command()
def main(check: Annotated[bool, typer.Option(help="fail instead of writing")] = False) -> None:
    """Fill the pages from the results, and draw the README's picture."""
    runs = lab.read_runs()
    tables = cpu_tables.tables() | {"gpu": gpu_tables.of_all(RESULTS)}
    readme = {"steps": steps.steps_table()}
    parts = {
        README: readme, BENCHMARKS: tables, STUDY: study.tables(), LAB: lab.parts(runs), PARALLEL: scale_plan.tables(),
    }  # fmt: skip
    pages = {path: filled(path.read_text(), of_page) for path, of_page in parts.items()}
    if check:
        for path, wanted in pages.items():
            if wanted != path.read_text():
                raise SystemExit(f"{path} does not hold what benchmarks/results says; run `make figures`.")
        return
    for path, wanted in pages.items():
        path.write_text(wanted)
    lab.draw(runs)
    study.draw()


if __name__ == "__main__":
    app()
