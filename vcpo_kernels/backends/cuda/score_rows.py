"""score_rows by the CUDA kernels of csrc/cuda: from sm_90 on one read and one write of the rows, which a cluster holds."""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels import _native
from vcpo_kernels.backends.cuda.token_stats import queue
from vcpo_kernels.backends.native.token_stats import address, empty_statistics, output_argument, rows_argument


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, score_sqnorm, lse, each [O, I] fp32; out = c d logp / d rows, and 0 where masked out or c = 0."""
    logp, entropy, score_sqnorm, lse = empty_statistics(rows)
    device, stream = queue(rows)
    with torch.cuda.device(rows.device):
        _native.cuda_score_rows(
            output_argument(out),
            rows_argument(rows),
            _native.Tokens(token_ids.data_ptr(), address(mask), shift),
            temperature,
            softcap or 0.0,
            address(coefficients),
            logp.data_ptr(),
            entropy.data_ptr(),
            score_sqnorm.data_ptr(),
            lse.data_ptr(),
            device,
            stream,
        )
    return logp, entropy, score_sqnorm, lse
