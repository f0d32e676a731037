"""The head where several ranks share its vocabulary: each has the rows of weight [v, H] of its shard, and all tokens.

Layer: rows [N, H] x [v, H] -> tokens [N]. One gather of all rows' states in the forward, one all-reduce of d hidden, whose
parts the shards add up to, in the backward. The rows' rules are in `rows/vocabulary_shards.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import needs_grad, no_autocast
from vcpo_kernels.core.library import first_derivative_only
from vcpo_kernels.head.accumulate import HeadGradients
from vcpo_kernels.head.chunks import row_chunks
from vcpo_kernels.head.kept_scores import gradients_of, score_matrix, takes_fast
from vcpo_kernels.head.operands import Head, HeadInputs, Needs
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.shards import VocabularyShard, is_sharded_in
from vcpo_kernels.rows import views
from vcpo_kernels.rows import vocabulary_shards as rows_of_shards
from vcpo_kernels.rows.shard_states import MergedStatistics
from vcpo_kernels.rows.statistics import RowStatistics


def refuse_graph(check: Check) -> None:
    if torch.compiler.is_compiling():
        raise check.runtime_error(
            "torch.compile cannot trace a head whose vocabulary is shared. Make the logits and give them to token_stats with "
            "vocabulary=, or call this outside of the compiled function (torch.compiler.disable)."
        )


def taken_apart(
    hidden: Any, weight: Any, bias: Any, vocabulary: VocabularyShard | None
) -> tuple[Any, Any, Any, VocabularyShard | None, bool]:
    """This rank's parts of DTensors that tensor parallelism made, the shard, and whether d hidden is still to be summed.

    A weight sharded by its rows, beside a DTensor hidden of the same mesh or with `vocabulary` given; anything else stays as
    it is. A hidden that is sharded by tokens (sequence parallelism) is gathered, its gradient scattered.
    """
    given = hidden
    if not is_sharded_in(weight, 0) or weight.device_mesh.ndim != 1:
        return hidden, weight, bias, vocabulary, True
    of_mesh = hasattr(hidden, "full_tensor") and hidden.device_mesh == weight.device_mesh
    if not of_mesh and vocabulary is None:
        return hidden, weight, bias, vocabulary, True
    if of_mesh:
        from torch.distributed.tensor import Partial, Replicate

        whole = given.redistribute(weight.device_mesh, [Replicate()])
        hidden = whole.to_local(grad_placements=[Partial()])
    weight, vocabulary = rows_of_shards.local_shard(weight, 0, vocabulary)
    bias, _ = rows_of_shards.local_shard(bias, 0, vocabulary)
    return hidden, weight, bias, vocabulary, not of_mesh


def statistics_of_shard(
    inputs: HeadInputs, shard: VocabularyShard, sums_hidden: bool, memory: str, chunk_bytes: int, fast_bytes: int | None
) -> RowStatistics:
    """As token_stats of the logits would give them, the same on all ranks; differentiable through logp and entropy."""
    needs = Needs(*needs_grad(inputs.hidden, inputs.weight, inputs.bias))
    if needs.hidden and not needs.parameters:  # S is needed for one product alone
        memory, fast_bytes = "auto", chunk_bytes
    call = (shard, sums_hidden, needs, memory, chunk_bytes, fast_bytes)
    return RowStatistics(*_LinearTokenStats.apply(*inputs, *call))


def part_of(inputs: HeadInputs, shard: VocabularyShard) -> HeadInputs:
    """Without the entries that are padding, ids counted from the shard's first."""
    width = shard.width(len(inputs.weight))
    bias = None if inputs.bias is None else inputs.bias[:width]
    return inputs._replace(weight=inputs.weight[:width], bias=bias, token_ids=inputs.token_ids - shard.start)


def _merged(head: Head, shard: VocabularyShard, kept: Tensor | None, chunk_bytes: int) -> MergedStatistics:
    """Statistics of the rows of `head`, whose logits are left in `kept` where that is given."""
    ids = head.token_ids + shard.start
    if head.vocabulary == 0:
        states = rows_of_shards.empty_states(ids, head.hidden)
    elif kept is not None:
        states = _states(head, slice(0, head.rows), head.logits(kept))
    else:
        parts = [_states(head, rows, logits) for rows, logits in row_chunks(head, chunk_bytes)]
        states = torch.cat(parts, 1) if parts else rows_of_shards.empty_states(ids, head.hidden)
    every = collectives.gathered(states, shard.group)
    return rows_of_shards.merged_statistics(
        every, ids, head.mask, head.temperature, head.softcap, False, shard.size
    )  # fmt: skip


def _states(head: Head, rows: slice, logits: Tensor) -> Tensor:
    mask = None if head.mask is None else head.mask[None, rows]
    backend = registry.select("token_states", logits.device, logits.dtype, logits.shape[-1])
    states: Tensor = backend.forward(logits[None], head.token_ids[None, rows], mask, **head.settings)
    return states[:, 0]


def forward(
    inputs: HeadInputs, shard: VocabularyShard, needs: Needs, memory: str, chunk_bytes: int, fast_bytes: int | None
) -> tuple[MergedStatistics, Tensor, Tensor]:
    """Statistics in the shape of token_ids, and the positions of the computed rows with what is kept of them."""
    views.check_ids("linear_token_stats", inputs.token_ids, inputs.mask, shard.size, inputs.shift)
    part = part_of(inputs, shard)
    positions = part.computed_positions()
    head = part.gathered(positions)
    with no_autocast(inputs.hidden):
        keeps = any(needs) and takes_fast(head, memory, chunk_bytes, fast_bytes)
        logits = score_matrix(head, memory) if keeps else None
        merged = _merged(head, shard, logits, chunk_bytes)
        kept = head.hidden.new_empty(0, head.vocabulary)
        if logits is not None:
            rows_of_shards.write_scores(logits, head.token_ids + shard.start, head.mask, merged, head.settings, shard)
            kept = logits if needs.parameters else logits @ head.weight
    outputs = MergedStatistics(*(part.scattered(s, positions) for s in merged))
    return outputs, part.every_position() if positions is None else positions, kept


def _forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
    shard, _, *options = arguments[8:]
    merged, positions, kept = forward(HeadInputs(*arguments[:8]), shard, *options)
    ctx.save_for_backward(*arguments[:5], *merged, positions, kept)
    return merged[: len(RowStatistics._fields)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings, ctx.call = inputs[5:8], inputs[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    shard, sums_hidden, needs, _, chunk_bytes, _ = ctx.call
    nothing = (None,) * 11
    if grad_logp is None and grad_entropy is None:
        return (None, None, None, *nothing)
    *tensors, positions, kept = ctx.saved_tensors
    inputs, merged = HeadInputs(*tensors[:5], *ctx.settings), MergedStatistics(*tensors[5:])
    saved = (merged.logp, merged.entropy, merged.lse, merged.target_logit)
    d = gradients_of(part_of(inputs, shard), saved, positions, kept, grad_logp, grad_entropy, chunk_bytes, needs)
    hidden = d.hidden
    if needs.hidden and sums_hidden:
        hidden = collectives.summed(hidden, shard.group)
    padding = len(inputs.weight) - shard.width(len(inputs.weight))
    d = HeadGradients(hidden, *(torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) if padding else x for x in d[1:]))
    return (*(grad if needed else None for grad, needed in zip(d, needs, strict=True)), *nothing)


_remembered, _once = first_derivative_only("linear_token_stats", _remember, _backward)


class _LinearTokenStats(torch.autograd.Function):
    """Not an op: a process group is no argument of one."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = _forward(ctx, *arguments)
        _remembered(ctx, arguments, outputs)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _once(ctx, *grads)
