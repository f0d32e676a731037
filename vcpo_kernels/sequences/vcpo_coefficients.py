"""The op between token statistics and the loss: everything VCPO knows about a batch of sequences, in one call.

Layer: tokens [N] -> sequences [B]. Log-weights, ESS, baselines, advantages and the one coefficient per sequence that the
backward pass needs. `vcpo_loss` is its public face. On a GPU it is three launches and no synchronisation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.library import define_op

# Names of the metrics tensor's entries, in order.
METRICS = (
    "ess",
    "ess_ratio",
    "num_sequences",  # with at least one valid token
    "num_tokens",  # valid ones
    "nonfinite_sequences",  # dropped: L_i or the reward NaN, or L_i = +inf (untruncated: above UNTRUNCATED_LIMIT)
    "truncated_fraction",  # of the sequences that take part, those with L_i > log max_weight
    "log_weight_mean",  # over the sequences that take part, as the next two
    "log_weight_max",
    "reward_mean",
    "advantage_sq_mean",
    "equal_reward_fraction",  # of the groups with sequences, those whose rewards are all equal: they teach nothing
    "single_sequence_groups",  # whose baseline is their own reward: they teach nothing either
    "log_ratio_abs_mean",  # of log pi - log mu over valid tokens, as the next: what `sequences/behavior.py` reads
    "log_ratio_negative_fraction",
)


class SequenceResults(NamedTuple):
    """What the op returns.

    log_weights: L_i [B]. lengths: |T_i| [B]. moments: float64 [3] (`weights.ess_moments`). baselines: b_g [num_groups].
    advantages: A_i [B]. coefficients: k_i w^_i A_i [B]. metrics: [len(METRICS)].
    """

    log_weights: Tensor
    lengths: Tensor
    moments: Tensor
    baselines: Tensor
    advantages: Tensor
    coefficients: Tensor
    metrics: Tensor


def _vcpo_coefficients(logp: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    backend = registry.select("vcpo_coefficients", logp.device, logp.dtype)
    results: tuple[Tensor, ...] = tuple(backend.forward(logp, *rest))
    return results


def _fake(logp: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, rewards, _, _, num_groups = rest[:7]
    batch = rewards.shape[0]
    return SequenceResults(
        log_weights=logp.new_empty(batch),
        lengths=logp.new_empty(batch),
        moments=logp.new_empty(3, dtype=torch.float64),
        baselines=logp.new_empty(num_groups),
        advantages=logp.new_empty(batch),
        coefficients=logp.new_empty(batch),
        metrics=logp.new_empty(len(METRICS)),
    )


# Flat positions N, sequences B. `group_ids` None: `group_size` consecutive sequences make a group. `score_norms` [B] or,
# where None, the sum of `token_scores` [N]. Scalars given as None take their value from the batch.
_op = define_op(
    "vcpo_coefficients(Tensor logp, Tensor behavior_logp, Tensor? token_scores, Tensor? score_norms, Tensor rewards,"
    " Tensor? group_ids, int group_size, SymInt num_groups, Tensor? mask, Tensor offsets, Tensor? order, bool skip_first,"
    " str baseline_weighting, str aggregation, bool normalize_std, float? max_weight, float? ess_max_weight,"
    " float? num_sequences, float? num_tokens, float? max_tokens)"
    " -> (Tensor log_weights, Tensor lengths, Tensor moments, Tensor baselines, Tensor advantages, Tensor coefficients,"
    " Tensor metrics)",
    _vcpo_coefficients, _fake,
)  # fmt: skip


def vcpo_coefficients(*arguments: Any) -> SequenceResults:
    """The op itself, arguments as in its schema. Not differentiable: the coefficients are constants of the loss."""
    return SequenceResults(*_op(*arguments))
