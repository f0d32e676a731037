"""slime: VCPO's loss as `--loss-type custom_loss`, and the hook that scales the rate. docs/slime.md has the flags.

slime's Megatron actor calls the loss once per micro-batch with fp32 logits [1, T, V] of sequences end to end, and normalises
what it returns over the global batch. With tensor parallelism V is a rank's shard of the vocabulary; with context parallelism
a rank has two stretches of each sequence (zigzag), and `advantages` and `rollout_log_probs` of their response tokens alone.
Written against slime's sources; slime is not imported, Megatron only where its ranks share something.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations import _ess_channel, megatron
from vcpo_kernels.integrations._given_advantages import weighted_advantages
from vcpo_kernels.parallel.ranks import Ranks
from vcpo_kernels.parallel.shards import VocabularyShard
from vcpo_kernels.rows.token_stats import TokenStats, token_stats
from vcpo_kernels.sequences.segments import Segments
from vcpo_kernels.step_size import EssLearningRate

WHERE = "vcpo_loss (slime)"
CHECK = Check(WHERE)

# slime's arguments that this loss cannot honour: (name, the value that means "off", why not, what to do).
_REFUSED: tuple[tuple[str, Any, str, str], ...] = (
    ("rollout_top_p", 1.0, "log-probabilities would have to be taken over the sampled nucleus", "Sample with 1.0."),
    ("rollout_top_k", -1, "log-probabilities would have to be taken over the tokens kept", "Sample with -1."),
    ("rollout_min_p", 0.0, "log-probabilities would have to be taken over the tokens kept", "Sample with 0."),
    ("use_tis", False, "VCPO's weights correct for the same ratio, and would be counted twice", "Leave it out."),
    ("use_opsm", False, "it belongs to slime's policy_loss", "Leave it out."),
    ("use_kl_loss", False, "it belongs to slime's policy_loss", "Put the penalty into the rewards (--kl-coef)."),
    ("custom_pg_loss_reducer_function_path", None, "it belongs to slime's policy_loss", "Leave it out."),
    ("recompute_loss_function", False, "the loss would be observed twice for each step", "Leave it out."),
)


def vcpo_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """VCPO's loss in slime's form: gradient -k w^_i A_t grad log pi_t, less `args.entropy_coef` times the entropy.

    w^_i = exp(min(L_i, log max_weight)), detached, L_i = sum_t m_t (log pi_t - rollout_log_prob_t) over the response of one
    sample, on whatever context ranks it lies; max_weight is `args.vcpo_max_weight` where there is one (from
    --custom-config-path), else 8.0. k is slime's: `sum_of_sample_mean`, and what slime multiplies the loss with afterwards. The
    logits are read once, by one gather over tensor ranks, and divided by `args.rollout_temperature`; entries from
    `args.vocab_size` on are padding.

    Args:
        args: slime's arguments.
        batch: unconcat_tokens, total_lengths, response_lengths and loss_masks of whole samples, lists; advantages and
            rollout_log_probs of this rank's response tokens, lists by sample.
        logits: [1, T, V] of this rank, T at least its part of total_lengths.
        sum_of_sample_mean: slime's reduction of a tensor of all response tokens of this rank.

    Returns:
        (0-d loss, metrics as 0-d tensors, reduced by `sum_of_sample_mean` like slime's own, so that its report divides them
        rightly with and without --calculate-per-token-loss).

    Raises:
        ValueError: an argument that cannot be honoured, by its name; or no rollout_log_probs.
        TypeError, ValueError: tensors that do not fit.
    """
    _check_arguments(args)
    CHECK.tensor("logits", logits, checks.FLOAT_DTYPES)
    if logits.dim() != 3 or logits.shape[0] != 1:
        raise CHECK.value_error(f"logits must be [1, T, V], got {checks.describe(logits)}.")
    if not batch.get("rollout_log_probs"):
        raise CHECK.value_error(
            "batch has no rollout_log_probs, so what the sampler's policy was is not known. Have the rollout set "
            "Sample.rollout_log_probs, as slime's own does."
        )
    ranks = _ranks(args)
    mine = _responses(batch, logits, ranks.sequence)
    stats = _token_stats(args, logits, mine, ranks.vocabulary)
    logp, entropy = stats.logp[0, mine.positions], stats.entropy[0, mine.positions]
    bounds = torch.tensor([0, *mine.lengths], device=logits.device).cumsum(0)
    segments = Segments.packed(bounds, mine.valid[mine.positions], sequence_group=ranks.sequence)
    joined = {
        name: torch.cat([t.to(logits.device) for t in batch[name]]) for name in ("advantages", "rollout_log_probs")
    }
    for name, value in joined.items():
        CHECK.shape(f"batch[{name!r}]", value, logp.shape, "one entry per response token of this rank")
    max_weight = getattr(args, "vcpo_max_weight", 8.0)
    result = weighted_advantages(CHECK, logp, joined["rollout_log_probs"], joined["advantages"], segments, max_weight)
    policy = sum_of_sample_mean(result.surrogate(logp))
    entropy_mean = sum_of_sample_mean(entropy)
    coefficient = float(getattr(args, "entropy_coef", 0.0))
    loss = policy - coefficient * entropy_mean if coefficient else policy
    how = "Pass --custom-megatron-before-train-step-hook-path vcpo_kernels.integrations.slime.before_train_step."
    _ess_channel.publish(WHERE, result, loss, how)
    metrics = {"loss": loss, "pg_loss": policy, "entropy_loss": entropy_mean}
    for name, per_sequence in _per_sequence_metrics(result.log_weights, max_weight).items():
        metrics[name] = sum_of_sample_mean(segments.spread(per_sequence, like=logp))
    return loss, {name: value.detach().clone() for name, value in metrics.items()}


def _check_arguments(args: Any) -> None:
    for name, off, why, fix in _REFUSED:
        value = getattr(args, name, off)
        if value != off:
            raise CHECK.value_error(f"{name}={value!r} cannot be honoured: {why}. {fix}")
    if getattr(args, "allgather_cp", False) and getattr(args, "context_parallel_size", 1) > 1:
        raise CHECK.value_error(
            "allgather_cp=True cannot be honoured with context_parallel_size > 1: a rank's logits are then of other tokens "
            "than its advantages and rollout_log_probs. Set context_parallel_size=1, or leave allgather_cp out."
        )


def _ranks(args: Any) -> Ranks:
    """Who shares the vocabulary and the sequences with this rank; Megatron is asked only where somebody does."""
    shared = any(getattr(args, f"{kind}_parallel_size", 1) > 1 for kind in ("tensor_model", "context"))
    return megatron.ranks() if shared else Ranks()


@dataclass(frozen=True)
class _Responses:
    """What this rank's positions predict. labels [T]; valid [T], where the prediction counts; positions of all response
    tokens, sample after sample; lengths: how many of each sample are here.
    """

    labels: Tensor
    valid: Tensor
    positions: Tensor
    lengths: list[int]


def _responses(batch: dict[str, Any], logits: Tensor, sequence: Any) -> _Responses:
    device, columns = logits.device, logits.shape[1]
    rank, ranks = (0, 1) if sequence is None else (dist.get_rank(sequence), dist.get_world_size(sequence))
    totals = [int(n) for n in batch["total_lengths"]]
    needed = sum(_columns(total, ranks) for total in totals)
    if needed > columns:
        raise CHECK.value_error(
            f"logits have {columns} positions for sequences of {sum(totals)} tokens, of which {needed} would be on each of "
            f"{ranks} context ranks. context_parallel_size must be Megatron's own."
        )
    labels = torch.zeros(columns, dtype=torch.int64, device=device)
    valid = torch.zeros(columns, dtype=torch.bool, device=device)
    positions, lengths, start = [torch.zeros(0, dtype=torch.int64, device=device)], [], 0
    fields = (batch[name] for name in ("unconcat_tokens", "loss_masks", "response_lengths"))
    for tokens, mask, length, total in zip(*fields, totals, strict=True):
        prompt = total - int(length)
        if not 0 < prompt <= total:
            raise CHECK.value_error(
                f"a response of {length} tokens in a sequence of {total} leaves no prompt to predict it from."
            )
        tokens, mask = tokens.to(device), CHECK.mask("loss_masks", mask.to(device))
        lengths.append(0)
        for at, first, stop in _stretches(prompt, total, rank, ranks):
            here = slice(start + at, start + at + stop - first)
            labels[here] = tokens[first + 1 : stop + 1]
            valid[here] = mask[first + 1 - prompt : stop + 1 - prompt]
            positions.append(torch.arange(here.start, here.stop, device=device))
            lengths[-1] += stop - first
        start += _columns(total, ranks)
    return _Responses(labels, valid, torch.cat(positions), lengths)


def _columns(total: int, ranks: int) -> int:
    """Of a sequence on each context rank: two of 2 * ranks chunks, the last of them padded."""
    return total if ranks == 1 else 2 * -(-total // (2 * ranks))


def _stretches(prompt: int, total: int, rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """Where this rank predicts response tokens, (column, first, stop): from its column on, positions first to stop of the
    sequence, each of which predicts the next. As slime has them: chunks `rank` and 2 * ranks - 1 - rank.
    """
    chunk = total if ranks == 1 else _columns(total, ranks) // 2
    found = []
    for column, index in ((0, rank), (chunk, 2 * ranks - 1 - rank))[: min(ranks, 2)]:
        first, stop = max(index * chunk, prompt - 1), min((index + 1) * chunk, total - 1)
        if first < stop:
            found.append((column + first - index * chunk, first, stop))
    return found


def _token_stats(args: Any, logits: Tensor, mine: _Responses, vocabulary: Any) -> TokenStats:
    """Over the entries that the sampler has: Megatron pads the vocabulary, with logits that mean nothing."""
    entries = logits.shape[-1] * (1 if vocabulary is None else dist.get_world_size(vocabulary))
    size = min(getattr(args, "vocab_size", None) or entries, entries)
    shard = None
    if vocabulary is not None and entries > logits.shape[-1]:
        shard = VocabularyShard.even(vocabulary, logits.shape[-1], size)
    elif size < entries:
        logits = logits[..., :size]
    temperature = float(getattr(args, "rollout_temperature", 1.0))
    return token_stats(logits, mine.labels[None], mine.valid[None], temperature=temperature, vocabulary=shard)


def _per_sequence_metrics(log_weights: Tensor, max_weight: float | None) -> dict[str, Tensor]:
    """[B] each; the last step's are the same for all."""
    usable = log_weights < math.inf
    cap = math.inf if max_weight is None else math.log(max_weight)
    metrics = {
        "vcpo_log_weight": torch.where(usable, log_weights, 0.0),
        "vcpo_truncated": (usable & (log_weights > cap)).to(log_weights.dtype),
        "vcpo_nonfinite": (~usable).to(log_weights.dtype),
    }
    if (last := _ess_channel.last_step()) is not None:
        for name, value in zip(("ess_ratio", "lr_scale"), last, strict=True):
            metrics[f"vcpo_last_step_{name}"] = value.to(log_weights).expand_as(log_weights)
    return metrics


# --- the step ---------------------------------------------------------------------------------------------------------


def before_train_step(
    args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, opt_param_scheduler: Any
) -> None:
    """slime's before-train-step hook: scale this and every later step by the ESS of its micro-batches on all ranks.

    The first call attaches an EssLearningRate to each torch optimizer inside Megatron's; rule and reference are
    `args.vcpo_ess_rule` and `args.vcpo_ess_reference` where there are such, else "sqrt" and 1.0. Gradients are zero when
    the hook runs, so whatever a skipped step left behind is forgotten.

    Raises TypeError where no torch optimizer is found, ValueError where ranks have different numbers of them.
    """
    rates = {id(rate.optimizer): rate for rate in _ess_channel.attached()}
    inner = megatron.torch_optimizers(optimizer)
    if not inner or not all(id(one) in rates for one in inner):
        inner = megatron.checked_optimizers(Check("before_train_step (slime)"), optimizer)
    for one in inner:
        rate = rates.get(id(one))
        if rate is None:
            _attach(args, one)
        else:
            rate.reset()


def _attach(args: Any, optimizer: torch.optim.Optimizer) -> EssLearningRate:
    rule, reference = getattr(args, "vcpo_ess_rule", "sqrt"), getattr(args, "vcpo_ess_reference", 1.0)
    return _ess_channel.attach(optimizer, rule, reference)
