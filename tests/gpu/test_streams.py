"""A VCPO loss among streams, graphs and devices: nothing waits, nothing races, everything lands on the right device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.cases.rows import make_inputs_in_parts
from benchmarks.cases.sequences import make_sequences
from benchmarks.cases.shapes import SequenceShape, Shape

SHAPE = SequenceShape(batch=8, length=8, group=4)


def whole_loss(device: torch.device, vocabulary: int = 32000) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """Logits that take a gradient, and a call that gives loss and gradient."""
    x = make_inputs_in_parts(Shape(SHAPE.tokens, vocabulary, "bfloat16"), device)
    s = make_sequences(SHAPE, device)
    leaf = x.logits.view(SHAPE.batch, SHAPE.length, vocabulary).requires_grad_()
    ids, mu = x.token_ids.view(leaf.shape[:2]), s.behavior_logp.view(leaf.shape[:2])

    def call() -> tuple[Tensor, Tensor]:
        out = vk.vcpo_loss(vk.token_stats(leaf, ids), mu, s.rewards, s.group, s.segments)
        return out.loss, torch.autograd.grad(out.loss, leaf)[0]

    return leaf, call


def not_eager(backend: str) -> None:
    if backend == "reference":
        pytest.skip("eager torch may wait for the device")


def test_the_loss_of_a_dry_run(backend: str, device: torch.device) -> None:
    """The loss that the other tests here are about has a gradient at all."""
    _, call = whole_loss(device, vocabulary=64)
    loss, gradient = call()
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())
    assert bool((gradient != 0).any())


def test_nothing_waits_for_the_device(backend: str, cuda: torch.device) -> None:
    """From the forward's first launch to the end of the backward, no call synchronises."""
    not_eager(backend)
    _, call = whole_loss(cuda)
    want = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got[1], want[1])


def test_captured_in_a_graph(backend: str, cuda: torch.device) -> None:
    """A replay reads the logits as they are then, and gives what a call gives."""
    not_eager(backend)
    leaf, call = whole_loss(cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = call()
    with torch.no_grad():
        leaf.copy_(leaf.flip(-1))
    graph.replay()
    want_loss, want_gradient = call()
    assert torch.equal(loss, want_loss)
    assert torch.equal(gradient, want_gradient)


def test_runs_on_the_current_stream(backend: str, cuda: torch.device) -> None:
    """Behind a long wait on a stream of its own; a launch on another stream would read the logits too early."""
    leaf, call = whole_loss(cuda)
    fresh = torch.randn_like(leaf)
    with torch.no_grad():
        before = leaf.clone()
        leaf.copy_(fresh)
    want = call()
    with torch.no_grad():
        leaf.copy_(before)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # about 30 ms
        with torch.no_grad():
            leaf.copy_(fresh)
        got = call()
    stream.synchronize()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_a_second_device(backend: str, cuda: torch.device) -> None:
    """Tensors of cuda:1 while cuda:0 is current: right, and there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = torch.device("cuda", 1)
    with torch.cuda.device(0):
        loss, gradient = whole_loss(there)[1]()
        want, want_gradient = whole_loss(torch.device("cuda", 0))[1]()
    assert gradient.device == there
    torch.testing.assert_close(loss.cpu(), want.cpu())
    assert torch.equal(gradient.cpu(), want_gradient.cpu())
