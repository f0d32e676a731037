"""Shards of the vocabulary on a GPU, in one process: every backend's states merge to the rows' statistics, and its backward
gives each shard its part of the rows' gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.rows import row_inputs
from tests.rows.row_checks import assert_gradient, assert_statistics, oracle
from vcpo_kernels.rows.shard_states import MergedStatistics
from vcpo_kernels.rows.token_stats import TokenStats

OPS = torch.ops.vcpo_kernels
SETTINGS = (0.9, None, False)  # temperature, softcap, shift


@pytest.mark.parametrize("vocabulary", (33, 4100, 32001))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("normal", "masked_vocabulary"))
def test_shards_match_float64(
    backend: str, device: torch.device, kind: str, dtype: torch.dtype, vocabulary: int
) -> None:
    with torch.device("cpu"):
        logits, ids = row_inputs.make(kind, 3, vocabulary, dtype)
    logits, ids = logits.to(device), ids.to(device)
    g, h = torch.randn(3, device=device), torch.randn(3, device=device)
    bounds = list(itertools.pairwise((0, vocabulary // 3, vocabulary // 3, vocabulary - 8, vocabulary)))  # one is empty
    shards = [logits[..., begin:end].clone().requires_grad_() for begin, end in bounds]
    states = [
        OPS.token_states(shard.detach(), ids, None, *SETTINGS, begin, vocabulary)
        for shard, (begin, _) in zip(shards, bounds, strict=True)
    ]
    merged = MergedStatistics(*OPS.merged_statistics(torch.stack(states), ids, None, *SETTINGS, vocabulary))
    want, want_grad = oracle(logits, ids, g, h, temperature=0.9)
    assert_statistics(TokenStats(merged.logp, merged.entropy, merged.score_sqnorm, merged.lse), want)
    grads = []
    for shard, (begin, _) in zip(shards, bounds, strict=True):
        logp, entropy = OPS.sharded_token_stats(shard, ids, None, *merged, *SETTINGS, begin, vocabulary, False)
        grads += torch.autograd.grad((logp, entropy), shard, (g, h))
    assert_gradient(torch.cat(grads, -1), want_grad, g.abs() + h.abs() * (1 + want.entropy), want)
