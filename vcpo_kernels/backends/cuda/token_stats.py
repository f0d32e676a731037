"""token_stats by the CUDA kernels of csrc/cuda: addresses, a device and PyTorch's current stream. The checks came before."""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels import _native
from vcpo_kernels.backends.native.token_stats import address, empty_statistics, output_argument, rows_argument


def queue(rows: Tensor) -> tuple[int, int]:
    """The device of `rows`, and the stream that PyTorch is using there."""
    stream = torch.cuda.current_stream(rows.device)
    return stream.device_index, stream.cuda_stream


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
    device, stream = queue(rows)
    with torch.cuda.device(rows.device):
        _native.cuda_token_stats_forward(
            rows_argument(rows),
            _native.Tokens(token_ids.data_ptr(), address(mask), shift),
            temperature,
            softcap or 0.0,
            logp.data_ptr(),
            entropy.data_ptr(),
            score_sqnorm.data_ptr(),
            lse.data_ptr(),
            device,
            stream,
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
    device, stream = queue(rows)
    with torch.cuda.device(rows.device):
        _native.cuda_token_stats_backward(
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
            device,
            stream,
        )
