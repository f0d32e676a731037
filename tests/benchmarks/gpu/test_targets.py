"""Targets on made-up results."""

from __future__ import annotations

from benchmarks.cases import rows as row_cases
from benchmarks.cases import rows_peers
from benchmarks.gpu import targets
from benchmarks.gpu.plan import GPU
from tests.benchmarks.gpu.made_up import headline_row


def test_targets_are_judged_by_the_better_backend() -> None:
    rows = [
        headline_row(row_cases.FORWARD, "cuda", median_ms=0.9, of_copy=0.91),
        headline_row(row_cases.FORWARD, "triton", median_ms=0.84, of_copy=0.93),
        headline_row(row_cases.BACKWARD, "cuda", median_ms=3.0, of_copy=0.89),
        headline_row(row_cases.BACKWARD, rows_peers.LIGER_SEQUENCE, median_ms=4.5, of_copy=0.99, peer=True),
    ]
    judged = {(t.work, t.quantity): (m and m.value, s) for t, m, s in targets.evaluate(rows, GPU)}
    assert judged[row_cases.FORWARD, targets.COPY] == (0.93, targets.REACHED)
    assert judged[row_cases.FORWARD, "ms"] == (0.84, targets.REACHED)
    assert judged[row_cases.BACKWARD, f"{targets.COPY}, 3 NV"] == (0.89, targets.MISSED)
    assert judged[row_cases.BACKWARD, "times Liger's sequence path"] == (1.5, targets.REACHED)
    assert judged[row_cases.SCORE, f"{targets.COPY}, 2 NV"] == (None, targets.NOT_MEASURED)
