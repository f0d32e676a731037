"""Sequence-level importance weights in the log domain, and which of them a loss may use.

Layer: tokens [N] -> sequences [B]. exp(L_i) is never formed unclipped, so no L_i overflows.
"""

from __future__ import annotations

import math

from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.segments import Segments, check_seen, check_segments

# Without truncation, a weight above e^80 = 5e34 would overflow fp32 on its way to the gradient: its sequence is dropped and
# counted like one whose L_i is +inf.
UNTRUNCATED_LIMIT = 80.0


def sequence_log_weights(logp: Tensor | TokenStats, behavior_logp: Tensor, segments: Segments) -> Tensor:
    """Log importance weight of each sequence: L_i = sum_t m_t (logp_t - behavior_logp_t), summed in float64.

    Args:
        logp: log pi_theta of each token, or the TokenStats that hold it (a shifted entry 0 then never counts).
        behavior_logp: log mu of each token as the sampler recorded it, same shape; masked-out entries may hold anything.
            A constant: no gradient reaches it.
        segments: which tokens belong to which sequence.

    Returns:
        [B] in float32, or float64 where logp is; 0 for a sequence with no valid token. Differentiable in logp.

    Raises:
        TypeError, ValueError: for tensors that do not match the segments.

    >>> import torch, vcpo_kernels as vk
    >>> seg = vk.Segments.padded(torch.tensor([[1, 1], [1, 0]]))
    >>> vk.sequence_log_weights(torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]), torch.full((2, 2), -1.5), seg)
    tensor([0.0000, 0.5000])
    """
    check = Check("sequence_log_weights")
    check_segments(check, segments)
    theta = logp.logp if isinstance(logp, TokenStats) else logp
    check.tensor("logp", theta, checks.FLOAT_DTYPES)
    check.tensor("behavior_logp", behavior_logp, checks.FLOAT_DTYPES)
    flat = segments.flat(check, "logp", theta)
    mu = segments.flat(check, "behavior_logp", behavior_logp).detach()
    check.shape("behavior_logp", mu, flat.shape, "as many tokens as logp")
    if isinstance(logp, TokenStats):
        check_seen(check, segments, logp)
        segments = segments.seen_by(logp)
    else:
        segments = segments.predicted_by(logp)
    dtype = wide(flat.dtype)
    return segments.reduce(flat.to(dtype) - mu.to(dtype))


def usable(log_weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Which sequences take part in the loss: valid, and L_i neither NaN nor +inf (-inf is a weight of 0). Bool [B]."""
    ok = log_weights < math.inf
    return ok if valid is None else ok & valid


def usable_below(max_weight: float | None) -> float:
    """The L_i from which on a sequence takes no part in the loss."""
    return UNTRUNCATED_LIMIT if max_weight is None else math.inf
