"""The specification of score_rows in eager torch: the statistics of token_stats, and the rows' scores times coefficients.

Arithmetic in float64; fp32 statistics, or float64 for float64 in. Shapes: O outer, I inner (sequence) rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels.backends.reference import token_stats


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, score_sqnorm, lse, each [O, I]; out = c d logp / d rows, and 0 where masked out or c = 0."""
    settings = {"temperature": temperature, "softcap": softcap, "shift": shift}
    exact = rows.double()
    stats = token_stats.forward(exact, token_ids, mask, **settings)  # type: ignore[arg-type]
    logp, entropy, _, lse = stats
    c = torch.ones_like(logp) if coefficients is None else coefficients
    token_stats.backward(out, exact, token_ids, mask, logp, entropy, lse, c, None, **settings)  # type: ignore[arg-type]
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    logp, entropy, score_sqnorm, lse = (s.to(dtype) for s in stats)
    return logp, entropy, score_sqnorm, lse
