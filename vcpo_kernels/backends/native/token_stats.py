"""token_stats through the compiled extension: the kernels of csrc/cpu, or those of csrc/cuda for rows on a GPU.

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
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> RowStatistics:
    """Each [O, I] fp32."""
    statistics = RowStatistics.empty(rows.shape[:2], rows)
    with place_of(rows) as place:
        _native.token_stats_forward(
            rows_argument(rows),
            tokens_argument(token_ids, mask, shift),
            scaling_argument(temperature, softcap),
            statistics_argument(statistics),
            place,
        )
    return statistics


def backward(
    out: Tensor,  # [O, I, V], written; may be `rows` itself
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    logp: Tensor,  # [O, I] fp32, as are all below
    entropy: Tensor,
    lse: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
    target_logits: Tensor | None = None,  # [O, I] fp32
) -> None:
    """Writes every row of `out`. target_logits: the rows hold a block of their vocabulary, see the reference."""
    token_sized = (logp, entropy, lse, grad_logp, grad_entropy, target_logits)
    with place_of(rows) as place:
        _native.token_stats_backward(
            output_argument(out),
            rows_argument(rows),
            tokens_argument(token_ids, mask, shift),
            scaling_argument(temperature, softcap),
            _native.TokenGradients(*map(address, token_sized)),
            place,
        )
