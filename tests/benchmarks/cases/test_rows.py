"""Cases on rows against float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases.case import Case
from benchmarks.cases.rows import RowInputs, make_inputs, oracle
from benchmarks.comparisons.rows import CASES


@pytest.mark.parametrize("case", [c for c in CASES if "compile" not in c.name], ids=lambda c: f"{c.name}, {c.work}")
def test_every_case_computes_the_same(case: Case[RowInputs]) -> None:
    """What is compared is the same work: every competitor's fp32 result agrees with the float64 formulas."""
    x = make_inputs(8, 300, torch.float32, torch.device("cpu"))
    want = oracle(x)
    assert case.error(case.run(x), want) < 2e-5
