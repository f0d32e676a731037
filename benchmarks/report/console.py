"""Results as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.harness.results import Row


@dataclass(frozen=True)
class Column:
    """A field of the rows. form: how a number is written; "": text."""

    field: str
    heading: str
    form: str = ".3g"

    def cell(self, row: Row) -> str:
        value = row.get(self.field)
        return "" if value is None else f"{value:{self.form}}" if isinstance(value, float) else str(value)


NAME = Column("name", "", form="")
ROWS = (
    Column("work", "work", form=""),
    Column("name", "name", form=""),
    Column("median_ms", "ms"),
    Column("gb_per_s", "GB/s"),
    Column("fraction_of_copy", "of copy"),
    Column("peak_extra_mib", "extra MiB"),
    Column("max_error", "error"),
)
HEAD = (
    NAME,
    Column("median_ms", "ms"),
    Column("of_bare", "of bare GEMMs"),
    Column("times_slower", "times ours"),
    Column("of_two_passes", "of token_stats"),
    Column("peak_extra_mib", "extra MiB"),
    Column("max_error", "error"),
)
SEQUENCE_GRADIENTS = (
    NAME,
    Column("median_ms", "ms", form=".0f"),
    Column("of_plain", "of the plain step", form=".2f"),
    Column("peak_extra_mib", "beyond gradients, MiB", form=".0f"),
    Column("max_error", "error", form=".1e"),
)
STEPS = (
    NAME,
    Column("median_ms", "ms", form=".0f"),
    Column("fastest_ms", "fastest", form=".0f"),
    Column("slowest_ms", "slowest", form=".0f"),
    Column("of_base", "times the base", form=".3f"),
    Column("peak_extra_mib", "extra MiB", form=".0f"),
    Column("of_base_memory", "times the base's", form=".2f"),
)


def table(rows: Sequence[Row], title: str, columns: Sequence[Column]) -> Table:
    """The columns of which any row has something."""
    shown = [c for c in columns if any(r.get(c.field) is not None for r in rows)]
    out = Table(title=title)
    for column in shown:
        out.add_column(column.heading, justify="right" if column.form else "left", no_wrap=bool(column.form))
    for row in rows:
        out.add_row(*(column.cell(row) for column in shown))
    return out
