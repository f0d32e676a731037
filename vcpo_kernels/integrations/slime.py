"""slime: VCPO's loss as `--loss-type custom_loss`, and the hook that scales the rate. docs/slime.md has the flags.

slime's Megatron actor calls the loss once per micro-batch with fp32 logits [1, T, V] of sequences end to end, and normalises
what it returns over the global batch. Logits sharded over the vocabulary or the sequence are refused: `token_stats` wants whole
rows. Written against slime's documented signatures; nothing here imports slime or Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations import _ess_channel
from vcpo_kernels.integrations._given_advantages import weighted_advantages
from vcpo_kernels.rows.token_stats import token_stats
from vcpo_kernels.sequences.segments import Segments
from vcpo_kernels.step_size import EssLearningRate

WHERE = "vcpo_loss (slime)"
CHECK = Check(WHERE)

# slime's arguments that this loss cannot honour: (name, the value that means "off", why not, what to do).
_REFUSED: tuple[tuple[str, Any, str, str], ...] = (
    (
        "tensor_model_parallel_size",
        1,
        "the logits are sharded over the vocabulary",
        "Set it to 1, or use slime's own losses.",
    ),
    ("context_parallel_size", 1, "each rank holds part of every sequence, and w_i is the whole one's", "Set it to 1."),
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
    sample; max_weight is `args.vcpo_max_weight` where there is one (from --custom-config-path), else 8.0. k is slime's:
    `sum_of_sample_mean`, and what slime multiplies the loss with afterwards. The logits are read once, in place, and
    divided by `args.rollout_temperature`.

    Args:
        args: slime's arguments.
        batch: unconcat_tokens, total_lengths, response_lengths, loss_masks, advantages and rollout_log_probs, lists by sample.
        logits: [1, T, V], T at least the sum of total_lengths.
        sum_of_sample_mean: slime's reduction of a tensor of all response tokens.

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
    lengths = [int(n) for n in batch["response_lengths"]]
    ids, valid, positions = _layout(batch, lengths, logits)
    temperature = float(getattr(args, "rollout_temperature", 1.0))
    stats = token_stats(logits, ids[None], valid[None], temperature=temperature, shift=True)
    logp, entropy = stats.logp[0, positions], stats.entropy[0, positions]
    bounds = torch.tensor([0, *lengths], device=logits.device).cumsum(0)
    segments = Segments.packed(bounds, valid[positions])
    joined = {
        name: torch.cat([t.to(logits.device) for t in batch[name]]) for name in ("advantages", "rollout_log_probs")
    }
    for name, value in joined.items():
        CHECK.shape(f"batch[{name!r}]", value, logp.shape, "one entry per response token")
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


def _layout(batch: dict[str, Any], lengths: list[int], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T]; valid [T], the response tokens that count; positions [sum of response lengths] of all response tokens."""
    if not batch.get("rollout_log_probs"):
        raise CHECK.value_error(
            "batch has no rollout_log_probs, so what the sampler's policy was is not known. Have the rollout set "
            "Sample.rollout_log_probs, as slime's own does."
        )
    device, columns = logits.device, logits.shape[1]
    totals = [int(n) for n in batch["total_lengths"]]
    if sum(totals) > columns:
        raise CHECK.value_error(
            f"logits have {columns} positions for sequences of {sum(totals)} tokens. With context parallelism a rank "
            "holds part of them: set context_parallel_size=1."
        )
    ids = torch.zeros(columns, dtype=torch.int64, device=device)
    valid = torch.zeros(columns, dtype=torch.bool, device=device)
    positions, end = [], 0
    for tokens, mask, total, length in zip(batch["unconcat_tokens"], batch["loss_masks"], totals, lengths, strict=True):
        if not 0 <= length < total:
            raise CHECK.value_error(
                f"a response of {length} tokens in a sequence of {total} leaves no prompt to predict it from."
            )
        ids[end : end + total] = tokens.to(device)
        end += total
        valid[end - length : end] = CHECK.mask("loss_masks", mask.to(device))
        positions.append(torch.arange(end - length, end, device=device))
    return ids, valid, torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64, device=device)


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

    Raises TypeError where no torch optimizer is found.
    """
    inner = torch_optimizers(optimizer)
    if not inner:
        raise TypeError(f"before_train_step (slime): found no torch.optim.Optimizer inside {type(optimizer).__name__}.")
    rates = {id(rate.optimizer): rate for rate in _ess_channel.attached()}
    for one in inner:
        rate = rates.get(id(one))
        if rate is None:
            _attach(args, one)
        else:
            rate.reset()


def _attach(args: Any, optimizer: torch.optim.Optimizer) -> EssLearningRate:
    rule, reference = getattr(args, "vcpo_ess_rule", "sqrt"), getattr(args, "vcpo_ess_reference", 1.0)
    return _ess_channel.attach(optimizer, rule, reference)


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers that step inside Megatron's: of a chain all, of a wrapper the wrapped one, of a stub none.

    >>> import torch
    >>> from vcpo_kernels.integrations.slime import torch_optimizers
    >>> len(torch_optimizers(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])))
    1
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    if hasattr(optimizer, "chained_optimizers"):
        return [inner for part in optimizer.chained_optimizers for inner in torch_optimizers(part)]
    inner = getattr(optimizer, "optimizer", None)
    return [] if inner is None else torch_optimizers(inner)
