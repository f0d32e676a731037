"""token_stats through the compiled extension: the CPU kernels of csrc/cpu. Passes addresses; the checks came before."""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels import _native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype in csrc/common/dtypes.h


def address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def rows_argument(rows: Tensor) -> _native.Rows:
    outer, inner, vocabulary = rows.shape
    return _native.Rows(
        rows.data_ptr(), DTYPE_CODES[rows.dtype], outer, inner, vocabulary, rows.stride(0), rows.stride(1)
    )


def output_argument(out: Tensor) -> _native.Output:
    return _native.Output(out.data_ptr(), out.stride(0), out.stride(1))


def empty_statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, score_sqnorm, lse to be written, each [O, I] fp32."""
    logp, entropy, score_sqnorm, lse = (
        torch.empty(rows.shape[:2], dtype=torch.float32, device=rows.device) for _ in range(4)
    )
    return logp, entropy, score_sqnorm, lse


def forward(
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, score_sqnorm, lse, each [O, I] fp32."""
    logp, entropy, score_sqnorm, lse = empty_statistics(rows)
    _native.token_stats_forward(
        rows_argument(rows),
        _native.Tokens(token_ids.data_ptr(), address(mask), shift),
        temperature,
        softcap or 0.0,
        logp.data_ptr(),
        entropy.data_ptr(),
        score_sqnorm.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return logp, entropy, score_sqnorm, lse


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
    _native.token_stats_backward(
        output_argument(out),
        rows_argument(rows),
        _native.Tokens(token_ids.data_ptr(), address(mask), shift),
        temperature,
        softcap or 0.0,
        logp.data_ptr(),
        entropy.data_ptr(),
        lse.data_ptr(),
        address(grad_logp),
        address(grad_entropy),
        address(target_logits),
        torch.get_num_threads(),
    )
