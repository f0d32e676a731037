"""slime's micro-batch on Megatron's tensor and context ranks: its zigzag, its reducer, a padded vocabulary."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import vcpo_kernels as vk
from tests.distributed import counting
from tests.distributed import megatron_on_cpu as megatron
from tests.integrations.trainer_batches import Batch, batch, vcpo
from vcpo_kernels.integrations import _ess_channel, slime

PROMPTS = (3, 1, 4, 2, 9, 3, 1, 5)  # tokens before each sample's response of 7
VOCABULARY, PADDED = 11, 12
LAYOUTS = {"tp 2 x cp 2": (2, 2), "tp 2, dp 2": (2, 1), "cp 2, dp 2": (1, 2), "cp 4": (1, 4), "tp 4": (4, 1)}


def stretches(prompt: int, total: int, cp: int, rank: int) -> tuple[int, list[tuple[int, int]]]:
    """The chunks' length, and which positions this rank has: get_logits_and_tokens_offset_with_cp of slime's cp_utils."""
    if cp == 1:
        return total, [(0, total)]
    chunk = -(-total // (2 * cp))
    return chunk, [(rank * chunk, (rank + 1) * chunk), ((2 * cp - rank - 1) * chunk, (2 * cp - rank) * chunk)]


def responses(prompt: int, total: int, cp: int, rank: int) -> Tensor:
    """Which response tokens, counted from the first, are predicted on this rank."""
    _, own = stretches(prompt, total, cp, rank)
    positions = torch.cat([torch.arange(a, b) for a, b in own])
    return positions[(positions >= prompt - 1) & (positions < total - 1)] - (prompt - 1)


def micro_batch(b: Batch, out: vk.VCPOOutput, rows: range, cp: int, rank: int) -> tuple[dict[str, Any], Tensor]:
    """As slime's get_batch and its advantages leave it on a context rank; logits [1, T, PADDED], large past the vocabulary."""
    names = (
        "total_lengths",
        "response_lengths",
        "unconcat_tokens",
        "loss_masks",
        "advantages",
        "rollout_log_probs",
        "here",
    )
    fields: dict[str, Any] = {name: [] for name in names}
    pieces = []
    for i in rows:
        prompt, total = PROMPTS[i], PROMPTS[i] + 7
        here = responses(prompt, total, cp, rank)
        of_sample = (
            total, 7, torch.cat([torch.full((prompt,), 2), b.ids[i]]), b.mask[i].int(),
            torch.full((len(here),), out.advantages[i].item()), b.mu[i].float()[here], here,
        )  # fmt: skip
        for name, value in zip(names, of_sample, strict=True):
            fields[name].append(value)
        whole = torch.cat([torch.zeros(prompt - 1, VOCABULARY), b.logits[i].float(), torch.zeros(total, VOCABULARY)])
        pieces += [whole[first:stop] for first, stop in stretches(prompt, total, cp, rank)[1]]
    logits = torch.cat([*pieces, torch.full((3, VOCABULARY), float("nan"))])
    return fields, torch.nn.functional.pad(logits, (0, PADDED - VOCABULARY), value=50.0)[None]


def sample_means(fields: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """slime's get_sum_of_sample_mean: of this rank's tokens, over the whole sample's number."""

    def reduce(x: Tensor) -> Tensor:
        parts = zip(x.split([len(h) for h in fields["here"]]), fields["loss_masks"], fields["here"], strict=True)
        return sum((v * m[h]).sum() / m.sum().clamp(min=1) for v, m, h in parts)  # type: ignore[return-value]

    return reduce


def arguments(tp: int, cp: int, **changed: Any) -> Namespace:
    defaults = {"tensor_model_parallel_size": tp, "context_parallel_size": cp, "vocab_size": VOCABULARY}
    return Namespace(**defaults | {"rollout_temperature": 1.0, "entropy_coef": 0.0} | changed)


def step(tp: int, cp: int) -> dict[str, Any]:
    """Two micro-batches of each data rank and slime's hook: d logits of all ranks together, metrics, ESS, collectives."""
    from megatron.core import parallel_state

    b = batch()
    out, gradient = vcpo(b, vk.VCPOConfig())
    data, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_context_parallel_rank()
    share = PADDED // tp
    entries = slice(parallel_state.get_tensor_model_parallel_rank() * share, None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    args, total = arguments(tp, cp), torch.zeros_like(b.logits)
    slime.before_train_step(args, 0, 0, [None], optimizer, None)
    metrics: dict[str, Tensor] = {}
    first = parallel_state.get_data_parallel_rank() * 8 // data
    for rows in (range(first, first + 4 // data), range(first + 4 // data, first + 8 // data)):
        fields, logits = micro_batch(b, out, rows, cp, rank)
        with counting.collectives() as called:
            loss, found = slime.vcpo_loss(
                args, fields, logits[..., entries][..., :share].contiguous(), sample_means(fields)
            )
        total += torch.autograd.grad(loss / 7, b.logits)[0]  # the eighth sample has no valid token
        metrics = {name: metrics.get(name, 0.0) + value for name, value in found.items()}
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    optimizer.step()
    dist.all_reduce(total)
    sums = torch.stack([metrics[name].double() for name in ("loss", "vcpo_log_weight", "entropy_loss")])
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    (rate,) = _ess_channel.attached()
    _ess_channel.detach(rate)
    entropy = torch.where(b.mask, torch.distributions.Categorical(logits=b.logits).entropy(), 0.0).sum(-1)
    wanted = (7 * out.loss, out.log_weights[:7].sum(), (entropy / b.mask.sum(-1).clamp(min=1)).sum())
    return {
        "gradient": (total, gradient), "called": called, "ratio": (rate.ratio, out.ess_ratio),
        "sums": (sums, torch.stack([w.detach().double() for w in wanted])),
    }  # fmt: skip


def refused() -> str:
    b = batch()
    out, _ = vcpo(b, vk.VCPOConfig())
    fields, logits = micro_batch(b, out, range(8), 2, 0)
    try:
        slime.vcpo_loss(arguments(1, 2, allgather_cp=True), fields, logits, sample_means(fields))
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def before_initialization() -> str:
    from vcpo_kernels.integrations import megatron as ours

    try:
        ours.ranks()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def uneven_optimizers(rank: int) -> str:
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(1 + (rank == 3))]
    try:
        slime.before_train_step(arguments(1, 1), 0, 0, [None], Namespace(chained_optimizers=optimizers), None)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@megatron.on_cpu
def on_four(rank: int) -> dict[str, Any]:
    _ess_channel._PROCESS.warned = True
    found: dict[str, Any] = {"uneven": uneven_optimizers(rank), "before": before_initialization()}
    for name, (tp, cp) in LAYOUTS.items():
        with megatron.parallel(tp, cp):
            found[name] = step(tp, cp)
            found["refused"] = refused()
    return found
