"""The pages hold what the committed results say."""

from __future__ import annotations

from typer.testing import CliRunner

from benchmarks import figures


def test_readme_holds_what_the_results_say() -> None:
    result = CliRunner().invoke(figures.app, ["--check"])
    assert result.exit_code == 0, result.output
