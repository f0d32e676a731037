"""One optimizer step's window: from the statistics of its sequences, on all ranks, to one coefficient per token.

The parameters are constant over a window, so that its log-weights, ESS and baselines can be taken once, before its first
backward. Each rank keeps its own tokens; what is gathered is `COLUMNS` of each sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels.parallel.collectives import summed
from vcpo_kernels.sequences.aggregation import aggregation_scale
from vcpo_kernels.sequences.ess import EffectiveSampleSize
from vcpo_kernels.sequences.log_weights import UNTRUNCATED_LIMIT, usable_below
from vcpo_kernels.sequences.sequence_results import SequenceSums, Switches, sequence_results
from vcpo_kernels.sequences.vcpo_coefficients import METRICS, SequenceResults

# What is known of a sequence: `SequenceSums`, R_i, the id of its group, and sums over its tokens of entropy and KL penalty.
COLUMNS = (*SequenceSums._fields, "reward", "group", "entropy", "kl")


@dataclass(frozen=True)
class TokenStatistics:
    """Of one micro-batch, [B, T] each, without gradient: what a pass of the model and the sampler left.

    mask: true where a token is trained on. logp, entropy: under the current policy. behavior_logp: log mu.
    reference_logp: of the reference model, or None without a KL penalty.
    """

    mask: Tensor
    logp: Tensor
    entropy: Tensor
    behavior_logp: Tensor
    reference_logp: Tensor | None


@dataclass(frozen=True)
class WindowConfig:
    """The switches of VCPOConfig that a window needs, and the KL penalty's.

    max_tokens: T_max of "seq-mean-token-sum-norm". beta: weight of the KL penalty. kl_correction: multiply it by the
    token's importance ratio.
    """

    max_weight: float | None
    baseline_weighting: str
    aggregation: str
    normalize_std: bool
    ess_max_weight: float | None
    max_tokens: float
    beta: float = 0.0
    kl_correction: bool = True

    @property
    def _ratio_limit(self) -> float:
        return UNTRUNCATED_LIMIT if self.max_weight is None else math.log(self.max_weight)


class Counts(NamedTuple):
    """Of a whole window on all ranks, 0-d float64: sequences with tokens, and their tokens."""

    sequences: Tensor
    tokens: Tensor

    @staticmethod
    def of(masks: list[Tensor], group: Any) -> Counts:
        """From the masks [B, T] of this rank's micro-batches: known before the model has seen them. One collective."""
        lengths = torch.cat([mask.sum(1) for mask in masks])
        own = torch.stack([(lengths > 0).sum(), lengths.sum()]).double()
        return Counts(*summed(own, group).unbind())


@dataclass(frozen=True)
class Window:
    """Results of a window over all ranks, or of some of its micro-batches.

    sequences: results per sequence of all ranks, [W K]. scale: k_i [W K] float64, 0 for sequences out of the loss.
    columns: what was gathered, [W K, len(COLUMNS)] float64. counts: of the whole window.
    """

    sequences: SequenceResults
    scale: Tensor
    columns: Tensor
    counts: Counts

    @property
    def ess(self) -> EffectiveSampleSize:
        """What EssLearningRate observes."""
        metrics = dict(zip(METRICS, self.sequences.metrics.unbind(), strict=True))
        return EffectiveSampleSize(metrics["ess"], metrics["ess_ratio"], self.sequences.moments)

    def metrics(self) -> dict[str, float]:
        """Numbers to log, `vcpo_loss`'s and the mean baseline, by name. One transfer to the host."""
        b = self.sequences.baselines.double()
        found = b.isfinite()
        baseline = torch.where(found, b, 0.0).sum() / found.sum().clamp(min=1)
        values = torch.cat([self.sequences.metrics.double(), baseline[None]]).tolist()
        return dict(zip((*METRICS, "baseline_mean"), values, strict=True))

    def column(self, name: str) -> Tensor:
        """One of COLUMNS, [W K]."""
        return self.columns[:, COLUMNS.index(name)]

    def token_mean(self, column: str) -> float:
        """Mean over the window's tokens of a summed column. NaN tokens (of dropped sequences) are left out."""
        values, lengths = self.column(column), self.column("lengths")
        ok = values.isfinite()
        return float(torch.where(ok, values, 0.0).sum() / torch.where(ok, lengths, 0.0).sum().clamp(min=1))


def behavior_logp(
    logp: Tensor, sampling_logp: Tensor | None, old_logp: Tensor | None, correct_sampler: bool = True
) -> Tensor:
    """log mu of each token: what the sampler recorded, else what the trainer computed when it sampled, else logp (w = 1).

    A NaN of the sampler's (a token that it could not score) falls back on the other two. correct_sampler: false leaves the
    sampler's own record unused, for who wants the mismatch between sampler and trainer uncorrected.
    """
    fallback = logp.detach() if old_logp is None else old_logp
    if sampling_logp is None or not correct_sampler:
        return fallback
    return torch.where(sampling_logp.isnan(), fallback, sampling_logp)


def sequence_columns(
    stats: TokenStatistics, score_sqnorm: Tensor, rewards: Tensor, groups: Tensor, config: WindowConfig
) -> Tensor:
    """[B, len(COLUMNS)] float64 of one micro-batch. score_sqnorm, rewards, groups: [B]."""
    segments = vk.Segments.padded(stats.mask)
    log_ratio = stats.logp - stats.behavior_logp
    finite = log_ratio.isfinite()
    penalty = torch.zeros_like(stats.logp) if stats.reference_logp is None else _kl(stats, config)[0]
    sums = SequenceSums(
        log_weights=vk.sequence_log_weights(stats.logp, stats.behavior_logp, segments),
        score_norms=score_sqnorm,
        lengths=segments.lengths,
        ratio_abs=segments.sum(torch.where(finite, log_ratio.abs(), 0.0)),
        ratio_negative=segments.sum((finite & (log_ratio < 0)).to(log_ratio.dtype)),
        ratio_count=segments.sum(finite.to(log_ratio.dtype)),
    )
    columns = (*sums, rewards, groups, segments.sum(stats.entropy), segments.sum(penalty))
    return torch.stack([c.double() for c in columns], 1)


def window_of(columns: Tensor, config: WindowConfig, counts: Counts | None = None) -> Window:
    """Coefficients, baselines and ESS of the sequences of all ranks, from their columns [W K, len(COLUMNS)] float64.

    counts: of the whole window, where columns are of a part of it that has whole groups.
    """
    count = len(SequenceSums._fields)
    sums, (rewards, group) = SequenceSums(*columns[:, :count].unbind(1)), columns[:, count : count + 2].unbind(1)
    ids = torch.unique(group, return_inverse=True)[1]
    counts = counts or Counts((sums.lengths > 0).sum().double(), sums.lengths.sum())
    switches = Switches(
        config.baseline_weighting, config.aggregation, config.normalize_std, config.max_weight, config.ess_max_weight,
        *counts, config.max_tokens,
    )  # fmt: skip
    results = sequence_results(sums, rewards, ids, len(columns), switches, torch.float32)
    valid = sums.lengths > 0
    takes_part = valid & (sums.log_weights < usable_below(config.max_weight)) & rewards.isfinite()
    k = aggregation_scale(config.aggregation, sums.lengths, *counts, config.max_tokens)
    return Window(results, torch.where(takes_part, k, 0.0), columns, counts)


@dataclass(frozen=True)
class MicroBatchLoss:
    """c and h [B, T] (h None without an entropy bonus) of sum_t c_t logp_t + h_t entropy_t, and the value to report, 0-d."""

    coefficients: Tensor
    entropy_coefficients: Tensor | None
    value: Tensor


def micro_batch_loss(
    stats: TokenStatistics, window: Window, rows: slice, config: WindowConfig, entropy_coef: float = 0.0
) -> MicroBatchLoss:
    """This micro-batch's share of the window's loss; the shares of all, over all ranks, add up to it.

    The loss is -sum_i k_i w^_i A_i sum_t logp_t (reported with logp's factor at 1, as `vcpo_loss` does), plus
    beta sum_i k_i sum_t kl_t, less entropy_coef times the mean entropy of the window's tokens. rows: this micro-batch's
    among the window's.
    """
    segments = vk.Segments.padded(stats.mask)
    sequence, k = window.sequences.coefficients[rows], window.scale[rows].float()
    c, h = segments.spread(-sequence), None
    value = -(sequence.double() * window.sequences.lengths[rows].double()).sum()
    if stats.reference_logp is not None:
        token_k = config.beta * segments.spread(k)
        penalty, slope = _kl(stats, config)
        c = c + _product(token_k, slope)
        value = value + _product(token_k, penalty).double().sum()
    if entropy_coef:
        h = segments.spread(torch.where(k > 0, -entropy_coef / window.counts.tokens.clamp(min=1), 0.0).float())
        value = value + _product(h, stats.entropy).double().sum()
    return MicroBatchLoss(c, h, value.float())


def _product(k: Tensor, values: Tensor) -> Tensor:
    """k v, and 0 where k is: a dropped sequence has k = 0 and may hold NaN."""
    return torch.where(k != 0, k * values, 0.0)


def _kl(stats: TokenStatistics, config: WindowConfig) -> tuple[Tensor, Tensor]:
    """The penalty of each token and its derivative by logp, [B, T].

    k3 = e^d - d - 1 with d = ref - logp (Schulman), and TRL's correction by the token's importance ratio
    r = e^(logp - log mu), here truncated at max_weight: (r k3)' = r (k3 + 1 - e^d) = r (logp - ref), the gradient of the
    reverse KL.
    """
    assert stats.reference_logp is not None
    d = (stats.reference_logp - stats.logp).clamp(max=UNTRUNCATED_LIMIT)  # e^d stays in fp32's range
    k3 = torch.expm1(d) - d
    if not config.kl_correction:
        return k3, -torch.expm1(d)
    log_ratio = stats.logp - stats.behavior_logp
    ratio = log_ratio.clamp(max=config._ratio_limit).exp()
    # A truncated ratio is a constant.
    slope = torch.where(log_ratio <= config._ratio_limit, -ratio * d, -ratio * torch.expm1(d))
    return ratio * k3, slope


def split_rows(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A dict of row tensors (and 0-d ones, which all share) as `count` micro-batches of consecutive rows.

    TRL shuffles rows first. Here they stay in order, so that a window which is less than a generation holds whole groups.
    """
    rows = len(batch["prompt_ids"]) // count
    return [
        {k: v[i * rows : (i + 1) * rows] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
        for i in range(count)
    ]
