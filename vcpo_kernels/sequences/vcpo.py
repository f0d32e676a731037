"""vcpo_loss: from token statistics to a loss whose gradient VCPO (arXiv 2602.17616) prescribes.

Layer: sequences [B] -> scalars. The loss needs one coefficient per sequence, c_i = k_i w^_i A_i; its gradient reaches
the token statistics as -c_i at every valid token, and from there the logits through one more pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.trees import TensorTree
from vcpo_kernels.parallel.ranks import Ranks
from vcpo_kernels.rows.token_loss import policy_loss
from vcpo_kernels.rows.token_stats import TokenStats, check_stats
from vcpo_kernels.sequences import baselines, over_ranks
from vcpo_kernels.sequences.aggregation import AGGREGATIONS, longest_possible
from vcpo_kernels.sequences.behavior import warn_of_behavior
from vcpo_kernels.sequences.log_weights import usable
from vcpo_kernels.sequences.segments import Segments, check_seen, check_segments
from vcpo_kernels.sequences.sequence_results import Switches
from vcpo_kernels.sequences.vcpo_coefficients import METRICS, SequenceResults, vcpo_coefficients


@dataclass(frozen=True)
class VCPOConfig:
    """Every switch of `vcpo_loss`. Defaults are the paper's.

    max_weight: truncation of w_i in the loss, w^_i = min(w_i, max_weight); None: untruncated (a w_i that would
        overflow, L_i >= 80, then drops its sequence like +inf).
    baseline_weighting: "paper" 2 L_i + log n_i | "estimator" 2 log(k_i w^_i) + log n_i, which minimises the variance of the
        estimator really used | "official" 2 log w^_i + 2 L_i + log n_i, as the authors' code | "mean" the group mean |
        "length" weighted by |T_i| (OPO).
    normalize_std: divide advantages by the group's population standard deviation where that is > 1e-8.
    aggregation: k_i. "seq-mean-token-mean" 1/(B |T_i|) | "seq-mean-token-sum" 1/B | "seq-mean-token-sum-norm" 1/(B T_max) |
        "token-mean" 1/sum|T|.
    num_sequences, num_tokens: B and sum|T| of the whole step, where this batch is one micro-batch of several. None: counted.
    max_tokens: T_max. None: the padded length.
    score_norm: n_i: "logit" (sum of score_sqnorm, free), or a tensor [B] of squared gradient norms.
    ess_max_weight: truncation of the weights that ESS is taken of. None: unclipped.

    Raises TypeError or ValueError naming the field.

    >>> import vcpo_kernels as vk
    >>> vk.VCPOConfig(max_weight=None, aggregation="token-mean").baseline_weighting
    'paper'
    """

    max_weight: float | None = 8.0
    baseline_weighting: str = "paper"
    normalize_std: bool = True
    aggregation: str = "seq-mean-token-mean"
    num_sequences: float | None = None
    num_tokens: float | None = None
    max_tokens: float | None = None
    score_norm: str | Tensor = "logit"
    ess_max_weight: float | None = None

    def __post_init__(self) -> None:
        check = Check("VCPOConfig")
        for name in ("max_weight", "num_sequences", "num_tokens", "max_tokens", "ess_max_weight"):
            number = check.optional_positive_float(name, getattr(self, name))
            object.__setattr__(self, name, number)  # numpy's numbers become Python's, which op schemas take
        check.choice("baseline_weighting", self.baseline_weighting, tuple(baselines.WEIGHTINGS))
        check.choice("aggregation", self.aggregation, AGGREGATIONS)
        object.__setattr__(self, "normalize_std", check.boolean("normalize_std", self.normalize_std))
        named = isinstance(self.score_norm, str) and self.score_norm == "logit"
        if not named and not isinstance(self.score_norm, Tensor):
            raise check.value_error(
                f"score_norm must be 'logit' or a tensor [B] of squared gradient norms, "
                f"got {checks.describe(self.score_norm)}. Exact norms are a tensor of SequenceGradients: inside "
                "`with SequenceGradients(model) as grads`, after grads.backward(...), score_norm=grads.squared_norms()."
            )


@dataclass(frozen=True)
class VCPOOutput(TensorTree):
    """Result of `vcpo_loss`. Everything but `loss` is detached and stays on the device.

    loss: 0-d, differentiable. log_weights: [B], L_i. ess, ess_ratio: 0-d. baselines: [num_groups], b_g. advantages: [B], A_i.
    coefficients: [B], one per sequence, k_i w^_i A_i (an objective's are one per token). metrics: 0-d tensors by name
    (`vcpo_coefficients.METRICS`), safe to log later. ess_moments: float64 [3], what `EssLearningRate` merges over
    micro-batches and ranks.
    """

    loss: Tensor
    log_weights: Tensor
    ess: Tensor
    ess_ratio: Tensor
    baselines: Tensor
    advantages: Tensor
    coefficients: Tensor
    metrics: dict[str, Tensor]
    ess_moments: Tensor


def vcpo_loss(
    stats: TokenStats,
    behavior_logp: Tensor,
    rewards: Tensor,
    groups: int | Tensor,
    segments: Segments,
    config: VCPOConfig | None = None,
    num_groups: int | None = None,
    ranks: Ranks | None = None,
) -> VCPOOutput:
    """VCPO's loss, ESS and baselines from the statistics of a batch of sequences.

    With L_i = sum_t m_t (logp_t - mu_t), w^_i = exp(min(L_i, log max_weight)) detached, b_g the off-policy optimal baseline
    and A_i = (R_i - b_g) / std_g: gradient = -sum_i k_i w^_i A_i sum_t m_t grad logp_t; the reported value is
    -sum_i k_i w^_i A_i |T_i| (the surrogate with grad logp's factor at 1). VCPO, arXiv 2602.17616, eqs. for OPOB and ESS.

    A group whose rewards are all equal gets exactly zero advantages. A sequence with no valid token is in no count. A
    sequence whose L_i is NaN or +inf is dropped from the loss, stays in ESS's denominator (the step shrinks, never grows)
    and is counted in metrics["nonfinite_sequences"].

    Args:
        stats: from `token_stats`. Only logp is differentiated through.
        behavior_logp: log mu of each token as the sampler recorded it, the shape of stats.logp; masked-out entries may
            hold anything.
        rewards: R_i, [B].
        groups: sequences per prompt (consecutive), or an integer group id per sequence, [B].
        segments: which tokens belong to which sequence, and which count.
        config: every switch; None: the paper's defaults.
        num_groups: for group ids, how many there are; default B, which needs no synchronisation.
        ranks: the ranks that hold the step's other sequences and, where segments have a sequence_group, their sequences'
            other tokens. ESS, baselines, counts and metrics are then the whole step's, the same bits on every rank;
            log_weights, advantages and coefficients this rank's sequences'. An int `groups` means groups that are whole on
            this rank; ids are the step's, numbered below num_groups (default: the step's B). The loss is this rank's share:
            gradients are to be summed over data and sequence ranks (`Ranks.averaged`). Two collectives.

    Returns:
        VCPOOutput.

    Raises:
        TypeError, ValueError: naming the argument. On the CPU also for rewards that are not finite (on a GPU such a
        sequence is dropped and counted).

    >>> import torch, vcpo_kernels as vk
    >>> logits = torch.zeros(4, 2, 3, requires_grad=True)
    >>> stats = vk.token_stats(logits, torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]]))
    >>> seg = vk.Segments.padded(torch.ones(4, 2))
    >>> out = vk.vcpo_loss(stats, stats.logp.detach(), torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, seg)
    >>> out.ess_ratio, out.advantages
    (tensor(1.), tensor([ 1., -1.,  0.,  0.]))
    >>> out.loss.backward()
    """
    check = Check("vcpo_loss")
    x = _checked(check, stats, behavior_logp, rewards, segments, config)
    ranks = over_ranks.ranks_of(check, ranks, segments)
    if ranks is None:
        results = _of_this_rank(check, x, groups, num_groups)
    else:
        results = _of_all_ranks(check, ranks, x, groups, num_groups)
    if checks.readable(x.logp):
        warn_of_behavior(check.where, x.logp, x.behavior_logp, x.seen().valid(x.logp.numel()))
    if ranks is None:
        loss = policy_loss(x.logp, results.coefficients, results.lengths, *x.segments.tensors)
    else:
        share = x.seen().of_this_rank()
        loss = policy_loss(x.logp, results.coefficients * ranks.loss_factor, share.lengths, *share.tensors)
    metrics = dict(zip(METRICS, results.metrics.unbind(), strict=True))
    if x.unseen is not None:
        metrics["unseen_tokens"] = x.unseen.to(x.logp.dtype)
    return VCPOOutput(
        loss=loss,
        log_weights=results.log_weights,
        ess=metrics["ess"],
        ess_ratio=metrics["ess_ratio"],
        baselines=results.baselines,
        advantages=results.advantages,
        coefficients=results.coefficients,
        metrics=metrics,
        ess_moments=results.moments,
    )


@dataclass(frozen=True)
class _Inputs:
    """vcpo_loss's arguments, checked. Tokens flat [N], sequences [B]; one of token_scores and score_norms is None."""

    logp: Tensor
    behavior_logp: Tensor
    token_scores: Tensor | None
    score_norms: Tensor | None
    rewards: Tensor
    segments: Segments
    shifted: bool
    switches: Switches
    unseen: Tensor | None

    def seen(self) -> Segments:
        """The segments less what the statistics say nothing of."""
        padded = self.segments.max_length is not None
        return self.segments.less_first(self.logp.numel()) if self.shifted and padded else self.segments

    def check_values(self, check: Check, results: SequenceResults, rewards: Tensor, norms: Tensor | None) -> None:
        """On the CPU, raise for rewards and norms of valid sequences that are no numbers."""
        if checks.readable(rewards):
            baselines.check_rewards(check, rewards, results.lengths > 0)
            if norms is not None:
                taking_part = (results.lengths > 0) & usable(results.log_weights)
                baselines.check_norms(check, "config.score_norm", norms, taking_part)


def _checked(
    check: Check,
    stats: TokenStats,
    behavior_logp: Tensor,
    rewards: Tensor,
    segments: Segments,
    config: VCPOConfig | None,
) -> _Inputs:
    config = VCPOConfig() if config is None else config
    if not isinstance(config, VCPOConfig):
        raise check.type_error(
            f"config must be a VCPOConfig, got {checks.describe(config)}. Make one: VCPOConfig(...)."
        )
    check_segments(check, segments)
    check_stats(check, stats)
    logp = segments.flat(check, "stats", stats.logp)
    check.tensor("behavior_logp", behavior_logp, checks.FLOAT_DTYPES)
    mu = segments.flat(check, "behavior_logp", behavior_logp).detach()
    check.shape("behavior_logp", mu, logp.shape, "as many tokens as stats")
    check.tensor("rewards", rewards)
    check.shape(
        "rewards", rewards, (segments.num_sequences,), "one reward per sequence", "Flatten it: rewards.reshape(-1)."
    )
    check.same_device("rewards", rewards, "stats", logp)
    token_scores, score_norms = _norms(check, config, stats, segments, logp)
    max_tokens = longest_possible(
        check, config.aggregation, config.max_tokens, segments, "config.max_tokens", "Set VCPOConfig(max_tokens=...)"
    )
    unseen = check_seen(check, segments, stats)
    segments = segments.less_masked(stats)
    if stats.shifted and segments.max_length is None:
        # A packed sequence's first token was predicted from its neighbour: in no count, and without a gradient. (In padded
        # rows that is entry 0, which the op skips and token_stats gives no gradient.)
        segments = segments.less_first(logp.numel())
    switches = Switches(
        config.baseline_weighting, config.aggregation, config.normalize_std, config.max_weight, config.ess_max_weight,
        config.num_sequences, config.num_tokens, max_tokens,
    )  # fmt: skip
    return _Inputs(
        logp, mu.to(logp.dtype), token_scores, score_norms, rewards.detach().to(logp.dtype), segments, stats.shifted,
        switches, unseen,
    )  # fmt: skip


def _of_this_rank(check: Check, x: _Inputs, groups: int | Tensor, num_groups: int | None) -> SequenceResults:
    ids, group_size, count = baselines.check_groups(check, groups, x.segments.num_sequences, num_groups)
    if ids is not None:
        check.same_device("groups", ids, "stats", x.logp)
    results = vcpo_coefficients(
        x.logp.detach(), x.behavior_logp, x.token_scores, x.score_norms, x.rewards,
        ids, group_size, count, *x.segments.tensors, x.shifted, *x.switches,
    )  # fmt: skip
    x.check_values(check, results, x.rewards, x.score_norms)
    return results


def _of_all_ranks(
    check: Check, ranks: Ranks, x: _Inputs, groups: int | Tensor, num_groups: int | None
) -> SequenceResults:
    of_step = baselines.StepGroups.checked(check, groups, x.segments.num_sequences, num_groups)
    step = over_ranks.step_results(
        check, ranks, x.seen(), x.logp.detach(), x.behavior_logp, x.token_scores, x.score_norms, x.rewards,
        of_step, x.switches,
    )  # fmt: skip
    # Of all ranks' sequences, so that what is wrong on one is an error on all.
    x.check_values(check, step.results, step.rewards, None if x.score_norms is None else step.score_norms)
    return step.own()


def _norms(
    check: Check, config: VCPOConfig, stats: TokenStats, segments: Segments, logp: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(config.score_norm, Tensor):
        return segments.flat(check, "stats", stats.score_sqnorm).detach(), None
    norms = config.score_norm.detach()
    check.shape("config.score_norm", norms, (segments.num_sequences,), "one squared norm per sequence")
    check.same_device("config.score_norm", norms, "stats", logp)
    return None, norms.to(logp.dtype)
