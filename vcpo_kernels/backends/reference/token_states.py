"""The specification of token_states in eager torch, any device: the state of a shard of each row. Arithmetic in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vcpo_kernels.backends.reference.token_stats import _scaled, _to_rows, _valid
from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.rows.shard_states import EMPTY


def forward(
    rows: Tensor,  # [O, I, v]
    token_ids: Tensor,  # [O, I] int64, counted from the shard's first entry
    mask: Tensor | None,  # [O, I] bool
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> Tensor:
    """[5, O, I], as `rows/shard_states.py` says what travels; that of no entries where a token does not count."""
    dtype = wide(rows.dtype)
    ids = _to_rows(token_ids, shift)
    known = (ids >= 0) & (ids < rows.shape[-1])
    target = torch.where(known, ids, 0).unsqueeze(-1)
    z = _scaled(rows, 1.0, softcap)
    rest = z.scatter(-1, target, torch.where(known.unsqueeze(-1), -torch.inf, z.gather(-1, target)))
    reference = rest.amax(-1).to(dtype)
    t = rest - torch.where(reference == -torch.inf, 0.0, reference.double()).unsqueeze(-1)
    t *= math.log2(math.e) / temperature
    e = torch.exp2(t)
    centred = torch.where(e > 0, e * t, 0.0)
    target_logit = torch.where(known, rows.gather(-1, target).squeeze(-1), -torch.inf)
    state = torch.stack(
        [t.to(dtype) for t in (reference, e.sum(-1), centred.sum(-1), e.square().sum(-1), target_logit)]
    )
    empty = torch.tensor(EMPTY, dtype=dtype, device=rows.device)[:, None, None]
    state = torch.where(_valid(mask, ids.shape, shift, rows.device), state, empty)
    return torch.roll(state, 1, dims=2) if shift else state
