"""token_states through the compiled extension: on a CPU's threads, or on the GPU that the rows are on."""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels import _native
from vcpo_kernels.backends.native.arguments import address, place_of, rows_argument, scaling_argument, tokens_argument
from vcpo_kernels.rows.shard_states import NUMBERS


def forward(
    rows: Tensor,  # [O, I, v]
    token_ids: Tensor,  # [O, I] int64, counted from the shard's first entry
    mask: Tensor | None,  # [O, I] bool
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> Tensor:
    """[5, O, I] fp32, see the reference."""
    states = torch.empty((NUMBERS, *rows.shape[:2]), dtype=torch.float32, device=rows.device)
    with place_of(rows) as place:
        _native.token_states(
            rows_argument(rows),
            tokens_argument(token_ids, mask, shift),
            scaling_argument(temperature, softcap),
            address(states),
            place,
        )
    return states
