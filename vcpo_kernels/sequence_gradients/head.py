"""The fused head's part of SequenceGradients: its score matrix stands for the output gradients, its hidden for the inputs.

Layer: rows. d weight = sum_t left_t right_t^T, as any Linear's, whether the score matrix is in memory or computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import no_autocast
from vcpo_kernels.head import linear_token_stats, vocabulary_shards
from vcpo_kernels.head.accumulate import gradients
from vcpo_kernels.head.operands import HeadInputs, Needs
from vcpo_kernels.head.score_matrix import ByColumns, active_rows
from vcpo_kernels.parallel import collectives
from vcpo_kernels.rows.statistics import RowStatistics
from vcpo_kernels.sequence_gradients.capture import refuse_second_derivatives


@dataclass(frozen=True)
class HeadUse:
    """What one call leaves: d weight = sum_t left_t hidden_t^T and d bias = sum_t left_t factor_t, over rows at flat
    `positions` of hidden's leading dimensions.
    """

    left: ByColumns
    hidden: Tensor  # [M, H], factors included
    factors: Tensor  # [M, 1]
    positions: Tensor  # [M]
    upstream: Tensor  # [M, 1 or 2], the gradients to logp and entropy that left and factors are linear in


class DeferredHead(torch.autograd.Function):
    """linear_token_stats, differentiable to hidden; the rest of its gradient goes to `record`.

    The parameters are inputs so that the outputs ask for a gradient even where hidden does not; they are given none.
    """

    @staticmethod
    def forward(ctx: Any, record: Callable[[HeadUse], None], *arguments: Any) -> tuple[Tensor, ...]:
        inputs, (ctx.shard, ctx.sums_hidden, *options) = HeadInputs(*arguments[:8]), arguments[8:13]
        ctx.record, ctx.count, ctx.needs_hidden = record, len(arguments), inputs.hidden.requires_grad
        ctx.chunk_bytes, ctx.settings = options[1], inputs[5:]
        needs = Needs(ctx.needs_hidden, True, inputs.bias is not None)
        if ctx.shard is None:
            *statistics, target_logit, positions, kept = linear_token_stats.op(*inputs, *options, *needs)
            stats = RowStatistics(*statistics)
        else:
            stats, target_logit, positions, kept = vocabulary_shards.forward(inputs, ctx.shard, needs, *options)
        ctx.save_for_backward(*inputs[:5], stats.logp, stats.entropy, stats.lse, target_logit, positions, kept)
        ctx.mark_non_differentiable(stats.score_sqnorm, stats.lse)
        ctx.set_materialize_grads(False)
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        if grads[0] is None and grads[1] is None:
            return (None,) * (1 + ctx.count)
        *tensors, positions, kept = ctx.saved_tensors
        inputs = HeadInputs(*tensors[:5], *ctx.settings)
        if ctx.shard is not None:
            inputs = vocabulary_shards.part_of(inputs, ctx.shard.start, ctx.shard.size)
        active = active_rows(inputs, tuple(tensors[5:]), positions, grads[0], grads[1])
        head, d = active.head, active.logits_gradient(kept, ctx.chunk_bytes)
        with no_autocast(head.hidden):
            grad_hidden = gradients(head, d, Needs(ctx.needs_hidden, False, False)).hidden
            hidden, factors = d.scaled(head.hidden), d.scaled(torch.ones_like(head.hidden[:, :1]))
        at = inputs.every_position() if active.positions is None else active.positions - int(inputs.shift)
        upstream = [u for u in (active.saved.g, active.saved.h) if u is not None]
        ctx.record(HeadUse(d.matrix, hidden, factors, at, torch.stack(upstream, 1)))
        to_hidden = inputs.scattered_hidden(grad_hidden, active.positions) if ctx.needs_hidden else None
        if to_hidden is not None and ctx.shard is not None and ctx.sums_hidden:
            to_hidden = collectives.summed(to_hidden, ctx.shard.group)
        return (None, to_hidden, *(None,) * (ctx.count - 1))
