"""A small causal LM whose parts have the names that a plan of tensor parallelism is written for, and whose tokens may be split.

Attention by distance alone (ALiBi, arXiv 2108.12409): a token's place is all that it has to know of the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.loops.rollouts import VOCABULARY

WIDTH, HEADS, LAYERS = 32, 4, 2


class Output(NamedTuple):
    """logits: [B, T, VOCABULARY]"""

    logits: Tensor


class AllTokens(torch.autograd.Function):
    """x [B, t, ..] of every rank, side by side. Each rank's gradient of all of them is added up, and cut again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        every = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, x.contiguous(), group=group)
        return torch.cat(every, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.group)
        return whole.narrow(1, dist.get_rank(ctx.group) * ctx.length, ctx.length), None


class Attention(nn.Module):
    """Of this rank's heads, as many as q, k and v have columns for. group: ranks that have the other tokens, in their order."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.group = group
        self.slope = 0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x) for part in (self.q, self.k, self.v))
        first = 0
        if self.group is not None:
            first = dist.get_rank(self.group) * q.shape[1]
            k, v = AllTokens.apply(k, self.group), AllTokens.apply(v, self.group)
        q, k, v = (t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for t in (q, k, v))
        distance = (
            torch.arange(k.shape[2], device=q.device) - (first + torch.arange(q.shape[2], device=q.device))[:, None]
        )
        bias = torch.where(distance > 0, -torch.inf, self.slope * distance).to(q.dtype)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        return self.o(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class Block(nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(WIDTH), Attention(group)
        self.norm2, self.feed_forward = nn.RMSNorm(WIDTH), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class SmallModel(nn.Module):
    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(group) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Output:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return Output(self.head(self.norm(x)))


def small_model(group: Any = None) -> SmallModel:
    """The same weights at every call."""
    torch.manual_seed(0)
    model = SmallModel(group)
    nn.init.normal_(model.head.weight, std=0.3)
    return model
