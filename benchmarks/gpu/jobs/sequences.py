"""The coefficients on the device, a whole VCPO loss on the host, and both as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import sequences
from benchmarks.cases.case import OURS
from benchmarks.cases.sequences import COEFFICIENT_BOUND, COEFFICIENTS, COEFFICIENTS_GRAPH, GRAPH
from benchmarks.cases.shapes import SequenceShape
from benchmarks.gpu.jobs.workbench import Workbench
from benchmarks.harness.results import Row

LAUNCHES = 40  # 40 losses of about 15 launches each fit the device's queue of 1024


def fields_of(work: str, shape: SequenceShape) -> Row:
    return {
        "work": work,
        "name": OURS,
        "rows": shape.tokens,
        "vocabulary": None,
        "dtype": "float32",
        "batch": shape.batch,
    }


def coefficients(bench: Workbench) -> None:
    """Device time of the op, queued and replayed."""
    shape, case = bench.plan.sequences, sequences.CASE
    fields = fields_of(COEFFICIENTS, shape)
    if bench.skips(fields):
        return
    x = sequences.make_sequences(shape, bench.device)

    def found() -> float:
        want = sequences.oracle(x)
        return case.error(case.run(x), want)

    error: float | None = bench.guarded(fields, found)
    if error is None:
        return
    if not error <= COEFFICIENT_BOUND:
        bench.add("failure", {**fields, "reason": f"wrong: error {error:.2e} is over {COEFFICIENT_BOUND:.0e}"})
        return
    if (times := bench.guarded(fields, lambda: bench.clock.measure(partial(case.run, x)))) is not None:
        bench.add("time", {**fields, **times.fields(digits=5), "max_error": error})
    fields = fields_of(COEFFICIENTS_GRAPH, shape)
    if not bench.skips(fields):
        replayed(bench, fields, lambda: x.coefficients().coefficients)


def launches(bench: Workbench) -> None:
    """Host time of token_stats, vcpo_loss and backward at N = 64, and the same as a graph."""
    small, headline = bench.plan.small, bench.plan.headline
    x = sequences.make_loss(small, headline.vocabulary, headline.dtype, bench.device)
    logits = {"vocabulary": headline.vocabulary, "dtype": headline.dtype}
    for work, run in sequences.LAUNCHES.items():
        fields = fields_of(work, small) | logits
        if bench.skips(fields):
            continue
        result = bench.guarded(fields, partial(_launching, bench, partial(run, x)))
        if result is not None:
            times, first, second = result
            host = {"host_us": round(min(first, second), 2), "host_us_second": round(max(first, second), 2)}
            bench.add("time", {**fields, **times.fields(digits=5), **host})
    fields = fields_of(GRAPH, small) | logits
    if not bench.skips(fields):
        replayed(bench, fields, x.gradient)


def _launching(bench: Workbench, call: Callable[[], Tensor]) -> tuple[Any, float, float]:
    first, second = (bench.clock.host_microseconds(call, LAUNCHES) for _ in range(2))
    return bench.clock.measure(call), first, second


def replayed(bench: Workbench, fields: Row, call: Callable[[], Tensor]) -> None:
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
        host = bench.clock.host_microseconds(graph.replay, LAUNCHES)
        return bench.clock.measure(graph.replay), host

    if (result := bench.guarded(fields, run)) is not None:
        bench.add("time", {**fields, **result[0].fields(digits=5), "host_us": round(result[1], 2)})
