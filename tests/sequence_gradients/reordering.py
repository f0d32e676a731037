"""A small model whose Linear may see rows in another order than the batch's, and what it may do to them on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import vcpo_kernels as vk
from tests.sequence_gradients.models import VOCABULARY

WIDTH = 6
Inside = Callable[["Inner", Tensor, Tensor], Tensor]


class Inner(nn.Module):
    """Embedding, something between whose Linear may see rows in another order, head. The rest is token by token."""

    def __init__(self, inside: Inside) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.inside = inside

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(torch.tanh(x + self.inside(self, x, ids)))


def time_major(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    return m.linear(x.transpose(0, 1)).transpose(0, 1)


def time_major_flat(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    batch, length, width = x.shape
    return m.linear(x.transpose(0, 1).reshape(-1, width)).view(length, batch, width).transpose(0, 1)


def heads_before_the_batch(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    """As many heads as tokens, so that [H * B, T] has the rows of [B * T, H]."""
    batch, length, width = x.shape
    heads = m.linear(x.expand(length, batch, length, width).reshape(length * batch, length, width))
    return heads.view(length, batch, length, width).mean(0)


def reversed_batch(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    return m.linear(x.flip(0)).flip(0)


def by_expert(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    """Tokens sorted by what a router would say, and put back."""
    flat = x.flatten(0, 1)
    order = torch.argsort(ids.flatten() % 3, stable=True)
    return torch.zeros_like(flat).index_add(0, order, m.linear(flat[order])).view_as(x)


def by_length(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    """Rows sorted by how many of their tokens are no padding, and put back."""
    order = torch.argsort((ids != 0).sum(1), stable=True)
    return m.linear(x[order])[torch.argsort(order)]


def one_row_on(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    """The token before, across the rows' ends."""
    return m.linear(x.flatten(0, 1).roll(1, 0)).view_as(x)


def mean_of_the_batch(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    y = m.linear(x)
    return y + 1e-3 * y.mean(0)


def batch_statistics(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    y = m.linear(x)
    return nn.functional.batch_norm(y.flatten(0, 1), None, None, training=True).view_as(y)


def attention_across_the_batch(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    y = m.linear(x).transpose(0, 1)
    return nn.functional.scaled_dot_product_attention(y, y, y).transpose(0, 1)


def the_next_row_too(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    return m.linear(torch.cat([x[1:], x[:1]])) + m.linear(x)


REORDERED: list[Inside] = [
    time_major, time_major_flat, heads_before_the_batch, reversed_batch, by_expert, by_length, one_row_on,
    mean_of_the_batch, batch_statistics, attention_across_the_batch, the_next_row_too,
]  # fmt: skip


def backwards_in_time(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    return m.linear(x.flip(1)).flip(1)


def heads_within_the_batch(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    """[B, H, T, d] and [B * H, T, d], as attention has them."""
    batch, length, width = x.shape
    heads = x[:, None].expand(batch, length, length, width)
    return m.linear(heads).mean(1) + m.linear(heads.reshape(batch * length, length, width)).view_as(heads).mean(1)


def called_flat_and_in_pieces(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    return m.linear(x.flatten(0, 1)).view_as(x) + m.linear(x) * m.linear(x)


def sorted_within_the_row(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    order = torch.argsort(ids, stable=True)[..., None].expand_as(x)
    return torch.zeros_like(x).scatter(1, order, m.linear(x.gather(1, order)))


def detached_statistics(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    y = m.linear(x)
    return y - y.detach().mean((0, 1))


IN_PLACE: list[Inside] = [
    backwards_in_time, heads_within_the_batch, called_flat_and_in_pieces, sorted_within_the_row, detached_statistics,
]  # fmt: skip


def plain(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
    return m.linear(x)


def batch(size: int, length: int) -> tuple[Tensor, vk.Segments]:
    """Padded with zeros at the end, the longest row first."""
    ids = torch.randint(1, VOCABULARY, (size, length))
    mask = torch.arange(length) < torch.arange(length, length - size, -1).clamp(min=2)[:, None]
    return ids * mask, vk.Segments.padded(mask)


def scalars(model: nn.Module, ids: Tensor, seg: vk.Segments) -> Tensor:
    mask = None if seg.mask is None else seg.mask.view(ids.shape)
    return seg.sum(vk.token_stats(model(ids), ids, mask, shift=True).logp)
