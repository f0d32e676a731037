"""The specification of token_stats in eager torch, any device. Arithmetic in float64; fp32 out, or float64 for float64 in.

Written for reading: it materialises [outer, inner, V] several times over. Shapes: O outer, I inner (sequence) rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.rows.statistics import RowStatistics


def _scaled(rows: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = rows.double()
    if softcap is not None:
        # A logit of -inf is a masked entry, and stays one; tanh alone would lift it to -softcap.
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    return z / temperature


def _to_rows(value: Tensor, shift: bool) -> Tensor:
    """Token entries [O, I] in the order of the logits rows that predict them."""
    return torch.roll(value, -1, dims=1) if shift else value


def _valid(mask: Tensor | None, shape: torch.Size, shift: bool, device: torch.device) -> Tensor:
    """Which logits rows predict a token that counts, [O, I]."""
    valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.clone()
    if shift:
        valid[:, :1] = False
    return _to_rows(valid, shift)


def forward(
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> RowStatistics:
    """Each [O, I]."""
    valid = _valid(mask, rows.shape[:2], shift, rows.device)
    x = _scaled(rows, temperature, softcap)
    ids = _to_rows(token_ids, shift)
    known = (ids >= 0) & (ids < rows.shape[-1])
    target = torch.where(known, ids, 0).unsqueeze(-1)

    # The target apart from the rest of the row: 1 - p_y is then a sum of positive terms, not a difference.
    x_target = x.gather(-1, target).squeeze(-1)
    rest = x.scatter(-1, target, float("-inf"))
    peak = torch.maximum(rest.amax(-1), x_target)
    e_rest = torch.exp(rest - peak.unsqueeze(-1))
    e_target = torch.exp(x_target - peak)
    sum_rest = e_rest.sum(-1)
    total = sum_rest + e_target
    # log(total) keeps its relative precision when the target is the peak and total is barely above 1.
    log_total = torch.where(e_target == 1, torch.log1p(sum_rest), torch.log(total))

    logp = (x_target - peak) - log_total
    lse = peak + log_total
    centred = torch.where(e_rest > 0, rest - peak.unsqueeze(-1), 0.0)
    centred_target = torch.where(e_target > 0, x_target - peak, 0.0)
    mean_centred = ((e_rest * centred).sum(-1) + e_target * centred_target) / total
    entropy = log_total - mean_centred
    score = (sum_rest / total).square() + (e_rest / total.unsqueeze(-1)).square().sum(-1)

    nan = torch.full_like(logp, float("nan"))
    logp, score = torch.where(known, logp, nan), torch.where(known, score, nan)
    statistics = RowStatistics(logp, entropy, score, lse).map(lambda value: torch.where(valid, value, 0.0))
    return statistics.map(lambda value: (torch.roll(value, 1, dims=1) if shift else value).to(wide(rows.dtype)))


def backward(
    out: Tensor,  # [O, I, V], written; may be `rows` itself
    rows: Tensor,  # [O, I, V]
    token_ids: Tensor,  # [O, I] int64
    mask: Tensor | None,  # [O, I] bool
    logp: Tensor,  # [O, I], as are all below
    entropy: Tensor,
    lse: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
    target_logits: Tensor | None = None,
) -> None:
    """d rows = g (1[v=y] - p) - h p (log p + entropy), through softcap and temperature; 0 where g = h = 0.

    target_logits [O, I]: the rows hold only a block of their vocabulary. token_ids then count from its first entry, one
    outside [0, V) lies in another block, and the sampled token's logit, which may not be in sight, is given.
    """
    zero = torch.zeros_like(logp, dtype=torch.float64)
    valid = _valid(mask, rows.shape[:2], shift, rows.device)
    g = torch.where(valid, _to_rows(zero if grad_logp is None else grad_logp, shift), 0.0).unsqueeze(-1)
    h = torch.where(valid, _to_rows(zero if grad_entropy is None else grad_entropy, shift), 0.0).unsqueeze(-1)
    x = _scaled(rows, temperature, softcap)
    ids = _to_rows(token_ids, shift)
    known = (ids >= 0) & (ids < rows.shape[-1])
    target = torch.where(known, ids, 0).unsqueeze(-1)

    logp_rows, lse_rows, entropy_rows = (_to_rows(t, shift).double().unsqueeze(-1) for t in (logp, lse, entropy))
    if target_logits is None:
        log_p = torch.log_softmax(x, -1)
    else:  # from lse, or as (x_v - x_y) + logp: the smaller of lse and logp was rounded less
        x_target = _scaled(_to_rows(target_logits, shift), temperature, softcap).unsqueeze(-1)
        by_lse = lse_rows.abs() <= logp_rows.abs()
        log_p = torch.where(by_lse, x - lse_rows, (x - x_target) + logp_rows)
    p = log_p.exp()
    dx = -g * p - h * torch.where(p > 0, p * (log_p + entropy_rows), 0.0)
    p_target = torch.exp(logp_rows)
    h_part = torch.where(p_target > 0, p_target * (logp_rows + entropy_rows), 0.0)
    at_target = -g * torch.expm1(logp_rows) - h * h_part
    known = known.unsqueeze(-1)
    if target_logits is None:
        dx = torch.where(known, dx.scatter(-1, target, at_target), float("nan"))
    else:
        dx = dx.scatter(-1, target, torch.where(known, at_target, dx.gather(-1, target)))
    dx = dx / temperature
    if softcap is not None:
        dx = dx * (1 - torch.tanh(rows.double() / softcap).square())
    out.copy_(torch.where((g == 0) & (h == 0), 0.0, dx))
