"""vcpo_coefficients through the compiled extension: one call for what the reference does in some eighty."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vcpo_kernels import _native
from vcpo_kernels.backends.native.arguments import address, segments_argument
from vcpo_kernels.sequences.aggregation import AGGREGATIONS
from vcpo_kernels.sequences.vcpo_coefficients import METRICS, SequenceResults

_OF_DTYPE = {torch.float32: _native.vcpo_coefficients_f32, torch.float64: _native.vcpo_coefficients_f64}
# As the enums of csrc/sequence_ops.h have them.
_WEIGHTINGS = ("paper", "estimator", "official", "mean", "length")


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
    baseline_weighting: str,
    aggregation: str,
    normalize_std: bool,
    *numbers: float | None,
) -> SequenceResults:
    """See the reference."""
    inputs = [
        t if t is None else t.contiguous() for t in (logp, behavior_logp, token_scores, score_norms, rewards, group_ids)
    ]
    batch = rewards.shape[0]
    results = SequenceResults(
        log_weights=logp.new_empty(batch),
        lengths=logp.new_empty(batch),
        moments=logp.new_empty(3, dtype=torch.float64),
        baselines=logp.new_empty(num_groups),
        advantages=logp.new_empty(batch),
        coefficients=logp.new_empty(batch),
        metrics=logp.new_empty(len(METRICS)),
    )
    switches = _native.Switches(
        _WEIGHTINGS.index(baseline_weighting), AGGREGATIONS.index(aggregation), normalize_std, skip_first,
        *(math.nan if n is None else n for n in numbers),
    )  # fmt: skip
    with segments_argument(mask, offsets, order, logp.shape[0]) as segments:
        _OF_DTYPE[logp.dtype](
            [address(t) for t in inputs], group_size, num_groups, [t.data_ptr() for t in results], segments, switches,
            torch.get_num_threads(),
        )  # fmt: skip
    return results
