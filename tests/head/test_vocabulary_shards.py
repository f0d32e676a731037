"""The ops of a head whose vocabulary ranks share, without ranks: what torch asks of an op, and that shards in one process give
the whole head's statistics and gradients.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk

OPS = torch.ops.vcpo_kernels
SIZE, BOUNDS = 23, list(itertools.pairwise((0, 5, 5, 24)))  # an empty shard; the last has an entry of padding
SETTINGS = (0.7, None, True)  # temperature, softcap, shift
ALL = (True, True, True)


def operands() -> dict[str, Any]:
    return {
        "hidden": torch.randn(2, 4, 6), "weight": torch.randn(SIZE + 1, 6), "bias": torch.randn(SIZE + 1),
        "ids": torch.randint(0, SIZE, (2, 4)), "mask": torch.rand(2, 4) < 0.8,
    }  # fmt: skip


def states(x: dict[str, Any], begin: int, end: int, memory: str, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    tensors = (x["hidden"], x["weight"][begin:end], x["bias"][begin:end], x["ids"], x["mask"])
    outputs: tuple[Tensor, ...] = OPS.linear_token_states(*tensors, *SETTINGS, memory, 300, None, *needs, begin, SIZE)
    return outputs


@pytest.mark.parametrize("needs", [ALL, (True, False, False)], ids=["all", "hidden"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_shards_are_the_whole_head(memory: str, needs: tuple[bool, ...]) -> None:
    x = operands()
    leaves = [x["hidden"].clone(), x["weight"][:SIZE].clone(), x["bias"][:SIZE].clone()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    want = vk.linear_token_stats(*leaves[:2], x["ids"], leaves[2], x["mask"], SETTINGS[0], shift=True)
    g = torch.randn(2, 4)
    wanted = torch.autograd.grad(want.logp, leaves, g)
    of_shards = [states(x, begin, end, memory, needs) for begin, end in BOUNDS]
    every = torch.stack([s for s, _, _ in of_shards])
    grads = []
    for (begin, end), (_, entries, kept) in zip(BOUNDS, of_shards, strict=True):
        *statistics, target, product = OPS.linear_merged_statistics_(
            kept, x["weight"][begin:end], x["ids"], x["mask"], entries, every, *SETTINGS, *needs, begin, SIZE
        )
        for got, name in zip(statistics, ("logp", "entropy", "score_sqnorm", "lse"), strict=True):
            torch.testing.assert_close(got, getattr(want, name).detach(), atol=2e-6, rtol=2e-6)
        logp, entropy, _, lse = statistics
        grads.append(
            OPS.sharded_linear_token_stats_backward(
                x["hidden"], x["weight"][begin:end], x["bias"][begin:end], x["ids"], x["mask"], logp, entropy, lse,
                target, entries, kept if needs == ALL else product, g, None, *SETTINGS, 300, *needs, begin, SIZE,
            )
        )  # fmt: skip
    hidden, weight, bias = zip(*grads, strict=True)
    torch.testing.assert_close(sum(hidden), wanted[0], atol=5e-6, rtol=5e-6)
    if needs == ALL:
        for parts, whole_grad in ((weight, wanted[1]), (bias, wanted[2])):
            got = torch.cat(parts)
            torch.testing.assert_close(got[:SIZE], whole_grad, atol=5e-6, rtol=5e-6)
            assert not got[SIZE:].any()  # padding


@pytest.mark.parametrize("memory", ["auto", "fast", "lean"])
def test_ops_are_what_torch_asks_for(memory: str) -> None:
    x = operands()
    given = (x["hidden"], x["weight"], x["bias"], x["ids"], x["mask"])
    told = (*SETTINGS, memory, 300, None, *ALL, 0, SIZE)
    torch.library.opcheck(OPS.linear_token_states.default, (*given, *told))
    of_shard, entries, kept = OPS.linear_token_states(*given, *told)
    merge = (kept, x["weight"], x["ids"], x["mask"], entries, of_shard[None], *SETTINGS, *ALL, 0, SIZE)
    torch.library.opcheck(OPS.linear_merged_statistics_.default, merge)
    logp, entropy, _, lse, target, _ = OPS.linear_merged_statistics_(*merge)
    leaves = [t.clone().requires_grad_() for t in given[:3]]
    attached = (*leaves, *given[3:], logp, entropy, lse, target, entries, kept, *SETTINGS, 300, *ALL, 0, SIZE)
    torch.library.opcheck(OPS.sharded_linear_token_stats.default, attached)
    again, _ = OPS.sharded_linear_token_stats(*attached)
    (grad,) = torch.autograd.grad(again.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="sharded_linear_token_stats has no second derivative"):
        grad.sum().backward()
