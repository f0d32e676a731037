"""Statistics of rows from the states of their shards, in eager torch and float64, any device.

Some fifty operations on [W, N]: nothing beside the pass over the logits on a CPU. It adds in the order of the ranks, so that
all of them have the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vcpo_kernels.rows import views
from vcpo_kernels.rows.shard_states import MergedStatistics
from vcpo_kernels.rows.statistics import RowStatistics

LN2 = math.log(2)
_GONE = 2000.0  # 2^-2000 is 0, which an infinite distance would make NaN


def forward(
    states: Tensor,  # [W, 5, ..]
    token_ids: Tensor,  # [..] int64
    mask: Tensor | None,  # [..] bool
    size: int,
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> MergedStatistics:
    """Each in the shape of token_ids; the rule and the end of csrc/common/row_state.h (`merged`, `statistics_of`)."""
    reference, sum_exp, sum_centred, sum_sq, target_logit = states.double().unbind(1)
    scale = math.log2(math.e) / temperature
    top, target_logit = reference.amax(0), target_logit.amax(0)
    up = torch.where(sum_exp == 0, 0.0, (top - reference) * scale)  # an empty state has nothing to move
    rest, centred, squares = (x.sum(0) for x in _raised(sum_exp, sum_centred, sum_sq, up))

    z = target_logit if softcap is None else torch.where(
        target_logit == -torch.inf, target_logit, softcap * torch.tanh(target_logit / softcap)
    )  # fmt: skip
    alone = rest == 0
    base = torch.where(alone, 0.0, top)
    target = (z - base) * scale
    leads = alone | ~(target < 0)
    up = torch.where(leads, target, 0.0)
    others, centred, squares = (
        torch.where(alone, 0.0, x) for x in _raised(rest, centred, squares, torch.where(alone, 0.0, up))
    )
    t = target - up  # exactly 0 (or NaN) where the target leads
    e = torch.exp2(t)
    total = others + e
    log_total = torch.where(leads & ~total.isnan(), torch.log1p(others), torch.log(total))
    logp = t * LN2 - log_total
    entropy = log_total - LN2 * (centred + torch.where(e > 0, e * t, 0.0)) / total
    score = (others / total).square() + squares / total.square()
    lse = torch.where(leads, z, base) / temperature + log_total
    return _outputs(states, token_ids, mask, size, shift, (logp, entropy, score, lse), (target_logit, base, log_total))


def _raised(sum_exp: Tensor, sum_centred: Tensor, sum_sq: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums relative to a reference that is `up` binades higher."""
    up = torch.where(up < _GONE, up, _GONE)
    factor = torch.exp2(-up)
    return factor * sum_exp, factor * (sum_centred - up * sum_exp), factor.square() * sum_sq


def _outputs(
    states: Tensor, token_ids: Tensor, mask: Tensor | None, size: int, shift: bool,
    statistics: tuple[Tensor, ...], of_backward: tuple[Tensor, Tensor, Tensor],
) -> MergedStatistics:  # fmt: skip
    """NaN in what speaks of an unknown token, 0 where it does not count."""
    unknown = (token_ids < 0) | (token_ids >= size)
    valid = views.valid_tokens(token_ids, mask, shift)

    def settled(value: Tensor) -> Tensor:
        return (value if valid is None else torch.where(valid, value, 0.0)).to(states.dtype)

    logp, entropy, score, lse = statistics
    logp, score = (torch.where(unknown, torch.nan, value) for value in (logp, score))
    return MergedStatistics(*RowStatistics(logp, entropy, score, lse).map(settled), *map(settled, of_backward))
