"""The specification of score_rows in eager torch: the statistics of token_stats, and the rows' scores times coefficients.

Arithmetic in float64; fp32 statistics, or float64 for float64 in. Shapes: O outer, I inner (sequence) rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels.backends.reference import token_stats
from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.rows.statistics import RowStatistics


def forward(
    out: Tensor,  # [O, I, V], written; may be `rows` itself
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    coefficients: Tensor | None,  # [O, I]; None: all 1
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> RowStatistics:
    """Each [O, I]; out = c d logp / d rows, and 0 where masked out or c = 0."""
    settings = {"temperature": temperature, "softcap": softcap, "shift": shift}
    exact = rows.double()
    stats = token_stats.forward(exact, token_ids, mask, **settings)  # type: ignore[arg-type]
    c = torch.ones_like(stats.logp) if coefficients is None else coefficients
    saved = (stats.logp, stats.entropy, stats.lse)
    token_stats.backward(out, exact, token_ids, mask, *saved, c, None, **settings)  # type: ignore[arg-type]
    return stats.map(lambda value: value.to(wide(rows.dtype)))
