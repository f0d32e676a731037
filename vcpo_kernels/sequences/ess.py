"""Effective sample size of a batch of sequences, in the log domain, and the moments that merge it over batches and ranks.

Layer: sequences [B] -> scalars. No absolute epsilon is added anywhere, so a common factor of all weights changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import in_dtype
from vcpo_kernels.core.trees import TensorTree
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.ranks import Ranks, check_ranks
from vcpo_kernels.sequences.log_weights import usable


@dataclass(frozen=True)
class EffectiveSampleSize(TensorTree):
    """ess in [0, B], ratio = ess / B in [0, 1], both 0-d; moments: see `ess_moments`."""

    ess: Tensor
    ratio: Tensor
    moments: Tensor


def ess_moments(log_weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """(log sum w, log sum w^2, B) as float64 [3]: what batches, micro-batches and ranks merge exactly (`merge_moments`)."""
    logs = torch.where(usable(log_weights, valid), in_dtype(log_weights, torch.float64), -math.inf)
    count = logs.new_full((1,), len(logs)) if valid is None else valid.sum(0, keepdim=True, dtype=logs.dtype)
    return torch.cat([torch.stack([logs, 2 * logs]).logsumexp(1), count])  # of nothing, or of -inf alone: -inf


def merge_moments(moments: Tensor) -> Tensor:
    """Moments of a union of disjoint batches: [K, 3] -> [3]."""
    return torch.cat([moments[:, :2].logsumexp(0), moments[:, 2:].sum(0)])


def ess_from_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(ESS, ESS / B) from moments [3]; (0, 0) where no sequence has any weight."""
    first, second, count = moments.unbind()
    ess = (2 * first - second).exp().nan_to_num(0.0)  # inf - inf where there is no weight
    ess = torch.minimum(ess, count)  # rounding must not carry the ratio above 1
    return ess, ess / count.clamp(min=1)


def effective_sample_size(
    log_weights: Tensor, valid: Tensor | None = None, ranks: Ranks | None = None
) -> EffectiveSampleSize:
    """ESS = (sum w)^2 / sum w^2, as log ESS = 2 logsumexp(L) - logsumexp(2 L) (VCPO, arXiv 2602.17616).

    Unclipped weights: clamp log_weights first for truncated ones. Invariant to adding a constant to all of them. A NaN or
    +inf counts in the denominator of the ratio and nowhere else, so that a broken sequence shrinks the step.

    Args:
        log_weights: L_i, [B] (`sequence_log_weights`).
        valid: bool [B]; false takes a sequence out altogether (`segments.lengths > 0`). None: all take part.
        ranks: whose data ranks hold the step's other sequences. ESS is then of all of them, the same bits on every rank, by
            one gather of 24 bytes a rank, however many sequences each has.

    Returns:
        EffectiveSampleSize of 0-d tensors in log_weights' dtype.

    Raises:
        TypeError, ValueError: for another dtype or shape.

    >>> import torch, vcpo_kernels as vk
    >>> vk.effective_sample_size(torch.tensor([-1e4, -1e4, -1e4, -1e4])).ratio
    tensor(1.)
    """
    check = Check("effective_sample_size")
    check.tensor("log_weights", log_weights, (torch.float32, torch.float64), "Convert it: log_weights.float().")
    check.float64("log_weights", log_weights)
    if log_weights.dim() != 1:
        raise check.value_error(f"log_weights must be [B], got {checks.describe(log_weights)}.")
    if valid is not None:
        check.tensor("valid", valid, (torch.bool,), "Convert it: valid > 0.")
        check.shape("valid", valid, log_weights.shape, "log_weights.shape")
        check.same_device("valid", valid, "log_weights", log_weights)
    moments = ess_moments(log_weights.detach(), valid)
    if ranks is not None:
        check_ranks(check, ranks)
        moments = merge_moments(collectives.gathered(moments, ranks.data))
    ess, ratio = ess_from_moments(moments)
    return EffectiveSampleSize(ess.to(log_weights.dtype), ratio.to(log_weights.dtype), moments)
