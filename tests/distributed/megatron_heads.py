"""Megatron's vocabulary-parallel loss, its output layer and its GPTModel, beside ours of the same shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.distributed import counting
from tests.distributed import megatron_on_cpu as megatron
from tests.distributed.megatron_on_cpu import B, H, T

# Entries of the vocabulary: of 40 on four ranks, one shard is half padding and the next nothing else.
SIZES = (megatron.VOCABULARY, 40)
LOSSES = [
    (size, dtype, counted) for size in SIZES for dtype in (torch.float32, torch.bfloat16) for counted in (True, False)
]
HEADS = ("fast", "lean", "weighted_logp")
# Who adds up the shards' parts of d hidden: the head, or what Megatron has in front of it.
SUMS = ("head", "Megatron")


def loss(size: int, dtype: torch.dtype, counts_padding: bool) -> dict[str, Any]:
    """vocab_parallel_cross_entropy, which counts padding; or with its padding at -inf, and ours told the size."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group, rank = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()
    world = parallel_state.get_tensor_model_parallel_world_size()
    entries = megatron.padded(world, size) // world
    torch.manual_seed(size)
    whole = (torch.randn(T, B, world * entries) * 3).to(dtype)
    ids = torch.randint(0, size, (T, B))
    edges = torch.tensor([e for r in range(world) for e in (r * entries, (r + 1) * entries - 1)]).clamp(max=size - 1)
    ids.view(-1)[: len(edges)] = edges
    c = torch.randn(T, B)
    garbage = whole.clone()
    if not counts_padding:
        whole[..., size:], garbage[..., size:] = -torch.inf, 50.0
    here = slice(rank * entries, (rank + 1) * entries)
    theirs, ours = (x[..., here].clone().requires_grad_() for x in (whole, garbage))
    ce = vocab_parallel_cross_entropy(theirs * 1, ids)
    (want,) = torch.autograd.grad((c * ce).sum(), theirs)
    shard = vk.VocabularyShard.even(group, entries, size=None if counts_padding else size)
    stats = vk.token_stats(ours * 1, ids, vocabulary=shard)
    (got,) = torch.autograd.grad((-c * stats.logp).sum(), ours)
    summed, _ = vk.weighted_logp(ours * 1, ids, -c, vocabulary=shard)
    (known,) = torch.autograd.grad(summed, ours)
    return {"logp": (stats.logp.detach(), -ce.detach()), "grad": (got, want), "known": (known, want)}


def whole_hidden(hidden: Tensor, sequence_parallel: bool, sums: str) -> Tensor:
    """[s, b, H] of every token, ready for a shard's head."""
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as gather

    if sequence_parallel:
        return gather(hidden, tensor_parallel_output_grad=sums == "Megatron")  # type: ignore[no-any-return]
    return copy_to_tensor_model_parallel_region(hidden) if sums == "Megatron" else hidden  # type: ignore[no-any-return]


def fused(head: str, *operands: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Of hidden, weight, ids and c: logp, and sum_t c_t logp_t."""
    if head == "weighted_logp":
        summed, stats = vk.linear_weighted_logp(*operands, **options)
        return stats.logp, summed
    *operands, c = operands
    stats = vk.linear_token_stats(*operands, memory=head, **options)
    return stats.logp.detach(), (c * stats.logp).sum()


def output_layer_of(settings: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear

    entries = megatron.padded(parallel_state.get_tensor_model_parallel_world_size())
    options: dict[str, Any] = {"init_method": torch.nn.init.normal_, "bias": False, "gather_output": False}
    return ColumnParallelLinear(H, entries, config=settings, **options)


def output_layer(sequence_parallel: bool) -> dict[str, Any]:
    """ColumnParallelLinear's forward and its loss; logp and gradients of every head of ours, by who sums d hidden."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    settings = megatron.config(sequence_parallel)
    group, rank = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()
    world = parallel_state.get_tensor_model_parallel_world_size()
    torch.manual_seed(1)
    layer = output_layer_of(settings)
    ids, c, whole = torch.randint(0, megatron.VOCABULARY, (T, B)), torch.randn(T, B), torch.randn(T, B, H)
    hidden = (whole.chunk(world)[rank] if sequence_parallel else whole).clone().requires_grad_()
    operands = (hidden, layer.weight)
    ce = vocab_parallel_cross_entropy(layer(hidden)[0], ids)
    found: dict[str, Any] = {"Megatron": (-ce.detach(), *torch.autograd.grad((-c * ce).sum(), operands))}
    for sums in SUMS:
        options = {"vocabulary": vk.VocabularyShard.even(group, len(layer.weight)), "sum_hidden": sums == "head"}
        for head in HEADS:
            given = whole_hidden(hidden, sequence_parallel, sums)
            with counting.collectives() as called:
                logp, summed = fused(head, given, layer.weight, ids, c, **options)
                torch.autograd.grad(summed, (given, layer.weight), retain_graph=True)
            found[f"{sums}; {head}"] = (logp, *torch.autograd.grad(summed, operands))
            found[f"{sums}; {head}; called"] = called
    return found


def refused() -> dict[str, str]:
    """d hidden summed twice, and never, through views on the way."""
    from megatron.core import parallel_state

    shard = vk.VocabularyShard.even(parallel_state.get_tensor_model_parallel_group(), 4)
    found = {}
    for sequence_parallel in (False, True):
        for sums in SUMS if sequence_parallel else SUMS[1:]:
            hidden = (
                whole_hidden(torch.randn(T, B, H, requires_grad=True), sequence_parallel, sums).transpose(0, 1).double()
            )
            operands, ids = (hidden, torch.randn(4, H).double()), torch.zeros(hidden.shape[:2], dtype=torch.int64)
            wrong = sums == "Megatron"
            name = f"{sequence_parallel} {sums}"
            try:
                vk.linear_token_stats(*operands, ids, vocabulary=shard, sum_hidden=wrong)
            except ValueError as error:
                found[name] = str(error)
    layer = output_layer_of(megatron.config())
    try:
        vk.OPOBAccumulator([layer.weight], vk.VCPOConfig(num_sequences=B))
    except TypeError as error:
        found["OPOB"] = str(error)
    return found


def model(sequence_parallel: bool, tied: bool) -> dict[str, Any]:
    """Its own loss, and ours from its logits and from its hidden states: log-probabilities and all gradients."""
    from megatron.core import parallel_state

    gpt, x = megatron.gpt(sequence_parallel, tied), megatron.batch()
    group, c = parallel_state.get_tensor_model_parallel_group(), torch.where(x["mask"], x["c"], 0.0)
    inputs = (x["ids"], x["positions"], megatron.causal())

    def done(logp: Tensor, total: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        gpt.zero_grad()
        total.backward()
        return logp.detach(), {n: p.grad.clone() for n, p in gpt.named_parameters()}

    ce = gpt(*inputs, labels=x["labels"])
    found = {"Megatron": done(-ce * x["mask"], (-c * ce).sum())}
    logits = gpt(*inputs)
    shard = vk.VocabularyShard.even(group, logits.shape[-1])
    stats = vk.token_stats(logits, x["labels"], x["mask"], inplace_backward=True, vocabulary=shard)
    found["logits"] = done(stats.logp, (c * stats.logp).sum())
    weight = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
    # Without sequence parallelism Megatron sums a copy of a gradient that is not contiguous, as d hidden [s, b, H] here.
    for sums in SUMS if sequence_parallel else SUMS[:1]:
        options = {"vocabulary": vk.VocabularyShard.even(group, len(weight)), "sum_hidden": sums == "head"}
        gpt.post_process = False
        hidden = gpt(*inputs)
        gpt.post_process = True
        hidden = whole_hidden(hidden, sequence_parallel, sums).transpose(0, 1)
        stats = vk.linear_token_stats(hidden, weight, x["labels"], mask=x["mask"], **options)
        found[f"hidden; {sums}"] = done(stats.logp, (c * stats.logp).sum())
    return found


@megatron.on_cpu
def on_ranks(rank: int, world: int) -> dict[str, Any]:
    with megatron.parallel(world):
        found: dict[str, Any] = {f"loss {case}": loss(*case) for case in LOSSES}
        found["refused"] = refused()
        for sequence_parallel in (False, True):
            found[f"layer {sequence_parallel}"] = output_layer(sequence_parallel)
            for tied in (False, True):
                found[f"model {sequence_parallel} {tied}"] = model(sequence_parallel, tied)
    return found
