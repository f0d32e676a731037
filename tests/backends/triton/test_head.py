"""The head's ops and weighted_logp with their row kernels on Triton, against whole logits in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.head.head_inputs import FIELDS, HeadInputs, distance, make, through_head, through_logits

pytest.importorskip("triton")

BOUND = 2e-6
MODES: dict[str, dict[str, Any]] = {
    "fast": {"memory": "fast"},
    "lean": {"memory": "lean"},
    "lean, small chunks": {"memory": "lean", "chunk_bytes": 2000},
}


def inputs(device: torch.device, **options: Any) -> HeadInputs:
    x = make(torch.float32, (2, 3), 5, 101, **options)
    tensors = {name: value.to(device) for name, value in vars(x).items() if value is not None}
    return replace(x, **tensors)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert distance(a, b) <= BOUND


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_token_stats(mode: str, entropy: bool, device: torch.device) -> None:
    x = inputs(device, bias=True, masked=True, entropy=entropy)
    options = {"temperature": 0.8, "softcap": 5.0, "shift": mode != "fast"}
    want, want_gradients = through_logits(x, **options)
    with vk.use_backend("triton"):
        got, got_gradients = through_head(x, **MODES[mode], **options)
    assert_same([getattr(got, f) for f in FIELDS], [getattr(want, f) for f in FIELDS])
    assert_same(got_gradients, want_gradients)


def test_frozen_weight(device: torch.device) -> None:
    x = inputs(device)
    hidden = x.hidden.clone().requires_grad_()
    with vk.use_backend("triton"):
        stats = vk.linear_token_stats(hidden, x.weight, x.token_ids, chunk_bytes=1000)
        (stats.logp * x.g).sum().backward()
    assert_same([hidden.grad], through_logits(x)[1][:1])


@pytest.mark.parametrize("upstream", [1.0, -0.5])
@pytest.mark.parametrize("chunk_bytes", [1000, 1 << 20])
def test_linear_weighted_logp(chunk_bytes: int, upstream: float, device: torch.device) -> None:
    """An upstream gradient that is not 1 goes through the scale kernel."""
    x = inputs(device, bias=True, masked=True)
    x.g[0, 1] = 0
    want, want_gradients = through_logits(x)
    leaves = x.leaves()
    with vk.use_backend("triton"):
        loss, stats = vk.linear_weighted_logp(
            leaves[0], leaves[1], x.token_ids, x.g, leaves[2], x.mask, chunk_bytes=chunk_bytes
        )
        (loss * upstream).backward()
    assert_same([stats.logp], [want.logp])
    assert_same([t.grad for t in leaves], [upstream * g for g in want_gradients])


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_weighted_logp(inplace: bool, upstream: float, device: torch.device) -> None:
    logits, ids = torch.randn(2, 3, 40, device=device, requires_grad=True), torch.randint(0, 40, (2, 3), device=device)
    c = torch.tensor([[1.0, 0.0, -2.0], [0.5, 3.0, 0.0]], device=device)
    with vk.use_backend("reference"):
        stats = vk.token_stats(logits.double(), ids, shift=True)
        (want,) = torch.autograd.grad(upstream * (stats.logp * c).sum(), logits)
    with vk.use_backend("triton"):
        loss, ours = vk.weighted_logp(logits * 1, ids, c, shift=True, inplace=inplace)
        (got,) = torch.autograd.grad(loss * upstream, logits)
    assert_same([getattr(ours, f) for f in FIELDS], [getattr(stats, f) for f in FIELDS])
    assert_same([got], [want])
