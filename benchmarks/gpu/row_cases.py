"""The cases on rows and their float64 under the names that tests/gpu has for them; they live in benchmarks/cases/rows.py."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import rows
from benchmarks.cases.case import Case as RowCase
from benchmarks.cases.rows import CASES, GRID, RowInputs, error_bound, ours_backward, ours_inplace
from benchmarks.cases.rows import make_inputs_in_parts as make_inputs
from benchmarks.gpu.jobs.rows import VERIFIED_ROWS

__all__ = ["CASES", "GRID", "RowCase", "error_bound", "make_inputs", "oracle_of", "ours_backward", "ours_inplace"]


class Oracle(rows.Oracle):
    def error(self, case: RowCase[RowInputs], got: Any) -> float:
        return case.error(got, self)


def oracle_of(x: RowInputs) -> Oracle:
    return Oracle(**vars(rows.oracle(x, VERIFIED_ROWS)))
