"""score_rows through the compiled extension: the kernels of csrc/cpu, or those of csrc/cuda for rows on a GPU.

Passes addresses; the checks came before. Serves two backends of the registry, "native" and "cuda".
"""

from __future__ import annotations

from torch import Tensor

from vcpo_kernels import _native
from vcpo_kernels.backends.native.arguments import (
    address,
    output_argument,
    place_of,
    rows_argument,
    scaling_argument,
    statistics_argument,
    tokens_argument,
)
from vcpo_kernels.rows.statistics import RowStatistics


def forward(
    out: Tensor,  # [O, I, V], written; may be `rows` itself
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    coefficients: Tensor | None,  # [O, I] fp32; None: all 1
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> RowStatistics:
    """Each [O, I] fp32; out = c d logp / d rows, and 0 where masked out or c = 0."""
    statistics = RowStatistics.empty(rows.shape[:2], rows)
    with place_of(rows) as place:
        _native.score_rows(
            output_argument(out),
            rows_argument(rows),
            tokens_argument(token_ids, mask, shift),
            scaling_argument(temperature, softcap),
            address(coefficients),
            statistics_argument(statistics),
            place,
        )
    return statistics
