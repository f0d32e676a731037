"""The specification of vcpo_coefficients in eager torch: sums over the tokens of each sequence, and the public formulas of
sequences/ from there on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcpo_kernels.backends.reference import segment_sum
from vcpo_kernels.sequences.segments import without_first
from vcpo_kernels.sequences.sequence_results import SequenceSums, Switches, sequence_results
from vcpo_kernels.sequences.vcpo_coefficients import SequenceResults


def forward(
    logp: Tensor,  # [N], as behavior_logp, token_scores, mask, order
    behavior_logp: Tensor,
    token_scores: Tensor | None,
    score_norms: Tensor | None,  # [B], as rewards, group_ids
    rewards: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    num_groups: int,
    mask: Tensor | None,
    offsets: Tensor,  # [B + 1]
    order: Tensor | None,
    skip_first: bool,
    *switches: str | bool | float | None,
) -> SequenceResults:
    """See `vcpo_kernels.vcpo_coefficients`. Sequence-sized arithmetic in float64 from L_i as it is returned."""
    if skip_first and order is None:
        mask = without_first(mask, offsets, logp.numel())

    def total(values: Tensor) -> Tensor:
        return segment_sum.forward(values, mask, offsets, order).double()

    if score_norms is None:
        assert token_scores is not None
        score_norms = total(token_scores)
    log_ratio = logp - behavior_logp
    finite = log_ratio.isfinite()
    sums = SequenceSums(
        log_weights=total(log_ratio),
        score_norms=score_norms.double(),
        lengths=total(torch.ones_like(logp, dtype=torch.float64)),
        ratio_abs=total(torch.where(finite, log_ratio.abs(), 0.0).double()),
        ratio_negative=total((finite & (log_ratio < 0)).double()),
        ratio_count=total(finite.double()),
    )
    batch = rewards.shape[0]
    ids = torch.arange(batch, device=logp.device) // group_size if group_ids is None else group_ids
    return sequence_results(sums, rewards.double(), ids, num_groups, Switches(*switches), logp.dtype)  # type: ignore[arg-type]
