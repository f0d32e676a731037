"""The ops of vocabulary shards, without ranks: what torch asks of an op, and that shards merge to whole rows in one process."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels.rows.shard_states import EMPTY, MergedStatistics

OPS = torch.ops.vcpo_kernels
SIZE, STARTS = 23, (0, 5, 5, 23)
SETTINGS = (0.7, None, True)


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, SIZE, dtype=dtype) * 3, torch.randint(0, SIZE, (2, 4)), torch.rand(2, 4) < 0.8


def merged(logits: Tensor, ids: Tensor, mask: Tensor | None) -> MergedStatistics:
    states = [
        OPS.token_states(logits[..., begin:end], ids, mask, *SETTINGS, begin, SIZE)
        for begin, end in itertools.pairwise(STARTS)
    ]
    return MergedStatistics(*OPS.merged_statistics(torch.stack(states), ids, mask, *SETTINGS, SIZE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shards_merge_to_whole_rows(dtype: torch.dtype) -> None:
    """float64 to float64's digits."""
    logits, ids, mask = rows(dtype)
    want = vk.token_stats(logits, ids, mask, SETTINGS[0], shift=True)
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    got = merged(logits, ids, mask)
    for name in ("logp", "entropy", "score_sqnorm", "lse"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=bound, rtol=bound)


def test_a_shard_without_entries_has_the_empty_state() -> None:
    logits, ids, _ = rows()
    states = OPS.token_states(logits[..., :0], ids, None, *SETTINGS, 5, SIZE)
    assert torch.equal(states, torch.tensor(EMPTY)[:, None, None].expand(5, 2, 4))


def test_ops_are_what_torch_asks_for() -> None:
    logits, ids, mask = rows()
    torch.library.opcheck(OPS.token_states.default, (logits, ids, mask, *SETTINGS, 0, SIZE))
    states = OPS.token_states(logits, ids, mask, *SETTINGS, 0, SIZE)[None]
    torch.library.opcheck(OPS.merged_statistics.default, (states, ids, mask, *SETTINGS, SIZE))
    of_all = merged(logits, ids, mask)
    shard = logits[..., 5:].clone().requires_grad_()
    torch.library.opcheck(OPS.sharded_token_stats.default, (shard, ids, mask, *of_all, *SETTINGS, 5, SIZE, False))
    coefficients = torch.randn(2, 4, requires_grad=True)
    torch.library.opcheck(OPS.weighted_sum.default, (of_all.logp.requires_grad_(), coefficients, mask))


def test_no_second_derivative() -> None:
    logits, ids, mask = rows()
    shard = logits[..., 5:].clone().requires_grad_()
    logp, _ = OPS.sharded_token_stats(shard, ids, mask, *merged(logits, ids, mask), *SETTINGS, 5, SIZE, False)
    (grad,) = torch.autograd.grad(logp.sum(), shard, create_graph=True)
    with pytest.raises(RuntimeError, match="sharded_token_stats has no second derivative"):
        grad.sum().backward()
