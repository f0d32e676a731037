"""The fused head's part of a deferred gradient: its score matrix stands for the output gradients, its hidden states for
the inputs.

Layer: rows. Either the score matrix is in memory ("fast"), or its blocks are computed when asked for ("lean"); in both
d weight = sum_t left_t right_t^T, as any Linear's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.head import arguments as _head_inputs
from vcpo_kernels.head import operands as _head
from vcpo_kernels.head.linear_token_stats import Saved, from_scores, recompute_block, recomputed, taking_part
from vcpo_kernels.head.operands import Head


@dataclass(frozen=True)
class Scores:
    """d logp / d logits in memory, of the rows of `index` (None: all)."""

    kept: Tensor
    index: Tensor | None

    @property
    def width(self) -> int:
        return self.kept.shape[1]

    @property
    def step(self) -> int:
        return self.width if self.index is None else _columns(_head.CHUNK_BYTES, len(self.index), self.kept)

    def block(self, columns: slice) -> Tensor:
        part = self.kept[:, columns]
        return part if self.index is None else part[self.index]

    def selected(self, rows: Tensor) -> Scores:
        return Scores(self.kept, rows if self.index is None else self.index[rows])


@dataclass(frozen=True)
class Recomputed:
    """d logits, upstream gradients included, computed again block by block in one buffer of `chunk_bytes`."""

    head: Head
    saved: Saved
    chunk_bytes: int

    @property
    def width(self) -> int:
        return self.head.vocabulary

    @property
    def step(self) -> int:
        return _columns(self.chunk_bytes, self.head.rows, self.head.hidden)

    def block(self, columns: slice) -> Tensor:
        out = _head.empty_large((self.head.rows, columns.stop - columns.start), self.head.hidden)
        with _head_inputs.no_autocast(out):
            recompute_block(self.head, self.saved, columns, out)
        return out

    def selected(self, rows: Tensor) -> Recomputed:
        return Recomputed(self.head.selected(rows), self.saved.selected(rows), self.chunk_bytes)


def _columns(chunk_bytes: int, rows: int, like: Tensor) -> int:
    return max(1, chunk_bytes // (max(rows, 1) * like.element_size()))


@dataclass(frozen=True)
class HeadUse:
    """What one call leaves: d weight = sum_t left_t hidden_t^T and d bias = sum_t left_t factor_t, over rows at flat
    `positions` of hidden's leading dimensions.
    """

    left: Scores | Recomputed
    hidden: Tensor  # [M, H], factors included
    factors: Tensor  # [M, 1]
    positions: Tensor  # [M]


class DeferredHead(torch.autograd.Function):
    """linear_token_stats, differentiable to hidden; the rest of its gradient goes to `record`.

    The parameters are inputs so that the outputs ask for a gradient even where hidden does not; they are given none.
    """

    @staticmethod
    def forward(ctx: Any, record: Callable[[HeadUse], None], hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        weight, bias, token_ids, mask, ctx.temperature, ctx.softcap, ctx.shift, memory, ctx.chunk_bytes, fast = rest[
            :10
        ]
        outputs = torch.ops.vcpo_kernels.linear_token_stats(
            hidden, weight, bias, token_ids, mask, ctx.temperature, ctx.softcap, ctx.shift,
            memory, ctx.chunk_bytes, fast, hidden.requires_grad, True, bias is not None,
        )  # fmt: skip
        logp, entropy, score_sqnorm, lse, target_logit, entries, kept = outputs
        ctx.record, ctx.needs_hidden, ctx.count = record, hidden.requires_grad, len(rest)
        ctx.save_for_backward(hidden, weight, bias, token_ids, mask, logp, entropy, lse, target_logit, entries, kept)
        ctx.mark_non_differentiable(score_sqnorm, lse)
        ctx.set_materialize_grads(False)
        return logp, entropy, score_sqnorm, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * ctx.count
        if grads[0] is None and grads[1] is None:
            return (None, None, *nothing)
        *saved_tensors, entries, kept = ctx.saved_tensors
        operands, statistics = tuple(saved_tensors[:5]), tuple(saved_tensors[5:])
        head, saved, index, at = taking_part(
            operands, statistics, entries, grads[0], grads[1], ctx.temperature, ctx.softcap, ctx.shift
        )
        hidden, needs = operands[0], (ctx.needs_hidden, False, False)
        with _head_inputs.no_autocast(hidden):
            if saved.h is None and kept.numel():
                left: Scores | Recomputed = Scores(kept, index)
                grad_hidden = from_scores(head, kept, index, saved.g, ctx.chunk_bytes, needs)[0]
                factors = saved.g[:, None].to(hidden.dtype)
                scaled = (head.hidden * saved.g[:, None]).to(hidden.dtype)
            else:
                left = Recomputed(head, saved, ctx.chunk_bytes)
                grad_hidden = _head.gradients(head, recomputed(head, saved, ctx.chunk_bytes), needs, head.hidden)[0]
                factors, scaled = torch.ones_like(head.hidden[:, :1]), head.hidden
        positions = torch.arange(head.rows, device=hidden.device) if at is None else at - int(ctx.shift)
        ctx.record(HeadUse(left, scaled, factors, positions))
        d = _head.scattered_rows(grad_hidden, at, hidden, ctx.shift) if ctx.needs_hidden else None
        return (None, d, *nothing)
