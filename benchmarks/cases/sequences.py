"""What lies between the row kernel and the coefficients, and what a whole VCPO loss costs to launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.gpu.clock import host_microseconds
from benchmarks.gpu.plan import SequenceShape, Shape
from benchmarks.gpu.row_cases import make_inputs
from vcpo_kernels.sequences.vcpo_coefficients import SequenceResults, vcpo_coefficients

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

COEFFICIENTS, COEFFICIENTS_GRAPH = "coefficients", "coefficients, CUDA graph"
LAUNCH, LAUNCH_FORWARD = "VCPO loss, launching", "VCPO loss, launching, forward alone"
GRAPH = "VCPO loss, CUDA graph"
COEFFICIENT_BOUND = 1e-4  # relative to the largest: exp(L) carries fp32 sums of T log-probabilities
LAUNCHES = 40  # 40 losses of about 15 launches each fit the device's queue of 1024


@dataclass(frozen=True)
class SequenceInputs:
    """Token statistics [N] of B padded sequences without padding, and their rewards [B]."""

    logp: Tensor
    behavior_logp: Tensor
    scores: Tensor
    rewards: Tensor
    segments: vk.Segments
    group: int

    def coefficients(self, wide: bool = False) -> SequenceResults:
        """The op as vcpo_loss calls it with the paper's defaults; wide: in float64."""
        dtype = torch.float64 if wide else torch.float32
        logp, mu, scores, rewards = (t.to(dtype) for t in (self.logp, self.behavior_logp, self.scores, self.rewards))
        return vcpo_coefficients(
            logp, mu, scores, None, rewards, None, self.group, len(rewards) // self.group,
            self.segments.mask, self.segments.offsets, self.segments.order, False,
            "paper", "seq-mean-token-mean", True, 8.0, None, None, None, None,
        )  # fmt: skip


def make_sequences(shape: SequenceShape, device: torch.device) -> SequenceInputs:
    """A behaviour policy a little way off: log-weights of about one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    logp = -normal(shape.tokens).abs()
    mu = logp + normal(shape.tokens) / shape.length**0.5
    mask = torch.ones(shape.batch, shape.length, dtype=torch.bool, device=device)
    rewards = (normal(shape.batch) > 0).float()
    return SequenceInputs(logp, mu, normal(shape.tokens).abs(), rewards, vk.Segments.padded(mask), shape.group)


def sequence_fields(work: str, shape: SequenceShape) -> dict[str, Any]:
    return {"work": work, "name": "vcpo_kernels", "rows": shape.tokens, "vocabulary": None, "dtype": "float32",
            "batch": shape.batch}  # fmt: skip


def coefficients_job(bench: Bench) -> None:
    """Device time of the op, queued and replayed."""
    shape = bench.plan.sequences
    fields = sequence_fields(COEFFICIENTS, shape)
    if bench.skips(fields):
        return
    x = make_sequences(shape, bench.device)

    def error() -> float:
        with vk.use_backend("reference"):
            want = x.coefficients(wide=True).coefficients
        return float(((x.coefficients().coefficients - want).abs().max() / want.abs().max()).item())

    if (found := bench.guarded(fields, error)) is None:
        return
    if not found <= COEFFICIENT_BOUND:
        bench.add("failure", {**fields, "reason": f"wrong: error {found:.2e} is over {COEFFICIENT_BOUND:.0e}"})
        return
    if (times := bench.guarded(fields, lambda: bench.clock.measure(x.coefficients))) is not None:
        bench.add("time", {**fields, **times.fields(), "max_error": found})
    fields = sequence_fields(COEFFICIENTS_GRAPH, shape)
    if not bench.skips(fields):
        replayed(bench, fields, lambda: x.coefficients().coefficients)


def replayed(bench: Bench, fields: dict[str, Any], call: Callable[[], Tensor]) -> None:
    """Captures a call, checks that a replay gives what a call gives, and times replays."""
    if bench.device.type != "cuda":
        bench.add("left out", {**fields, "reason": f"no CUDA graphs on {bench.device.type}"})
        return

    def run() -> Any:
        want = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        got.zero_()
        graph.replay()
        if not torch.equal(got, want):
            raise RuntimeError(f"a replay gives {got.flatten()[:4].tolist()}, a call {want.flatten()[:4].tolist()}")
        host = host_microseconds(graph.replay, LAUNCHES, bench.clock.synchronize)
        return bench.clock.measure(graph.replay), host

    if (result := bench.guarded(fields, run)) is not None:
        bench.add("time", {**fields, **result[0].fields(), "host_us": round(result[1], 2)})


def launch_job(bench: Bench) -> None:
    """Host time of token_stats, vcpo_loss and backward at N = 64, and the same as a graph."""
    small, headline = bench.plan.small, bench.plan.headline
    shape = Shape(small.tokens, headline.vocabulary, headline.dtype)
    x = make_inputs(shape, bench.device)
    s = make_sequences(small, bench.device)
    layout = (small.batch, small.length)
    leaf = x.logits.view(*layout, -1).requires_grad_()
    ids, mu = x.token_ids.view(layout), s.behavior_logp.view(layout)

    def forward() -> Tensor:
        stats = vk.token_stats(leaf, ids)
        return vk.vcpo_loss(stats, mu, s.rewards, s.group, s.segments).loss

    def whole() -> Tensor:
        return torch.autograd.grad(forward(), leaf)[0]

    for work, call in ((LAUNCH, whole), (LAUNCH_FORWARD, forward)):
        fields = {**sequence_fields(work, small), "vocabulary": shape.vocabulary, "dtype": shape.dtype}
        if bench.skips(fields):
            continue

        def run(call: Callable[[], Tensor] = call) -> tuple[Any, float, float]:
            first, second = (host_microseconds(call, LAUNCHES, bench.clock.synchronize) for _ in range(2))
            return bench.clock.measure(call), first, second

        if (result := bench.guarded(fields, run)) is not None:
            times, first, second = result
            host = {"host_us": round(min(first, second), 2), "host_us_second": round(max(first, second), 2)}
            bench.add("time", {**fields, **times.fields(), **host})
    fields = {**sequence_fields(GRAPH, small), "vocabulary": shape.vocabulary, "dtype": shape.dtype}
    if not bench.skips(fields):
        replayed(bench, fields, whole)
