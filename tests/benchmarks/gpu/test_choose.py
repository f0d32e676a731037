"""Where CUDA is chosen, on made-up results."""

from __future__ import annotations

from benchmarks.cases import rows as row_cases
from benchmarks.gpu import choose
from tests.benchmarks.gpu.made_up import headline_row
from vcpo_kernels.core.measured import Win


def test_wins_are_where_the_spread_is_beaten() -> None:
    """A tie is no win, a loss at one number of rows spoils a width, and a range ends at the last width that was won."""

    def pair(vocabulary: int, cuda: float, triton: float, rows: int = 8) -> list[dict[str, object]]:
        at = {"vocabulary": vocabulary, "rows": rows, "spread": 0.02}
        return [headline_row(row_cases.SCORE, n, median_ms=ms) | at for n, ms in (("cuda", cuda), ("triton", triton))]

    rows = pair(100, 1, 2) + pair(200, 1, 1.5) + pair(300, 1, 1.03) + pair(400, 1, 2) + pair(400, 2, 1, rows=1)
    assert choose.wins(rows) == (Win("score_rows", "bfloat16", 100, 200),)
    assert choose.wins([r | {"device": "cpu"} for r in rows]) == ()
