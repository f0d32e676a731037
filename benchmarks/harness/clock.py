"""Timing on a GPU: events around a call that finds a cold cache, medians, each taken twice.

Before every timed call a buffer ten times the L2 cache is rewritten. That empties the cache, and keeps the device busy
while the host queues the call behind it, so that what is timed is the device's work and not the host's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu.plan import Plan

SYNC_EVERY = 8  # calls that may be queued: the host must not run ahead of the time it was given


@dataclass(frozen=True)
class Times:
    """Milliseconds. median_ms: of all repeats; first_ms, second_ms: of each pass; spread: how far apart the passes are."""

    median_ms: float
    first_ms: float
    second_ms: float
    fastest_ms: float
    spread: float
    repeats: int

    def fields(self) -> dict[str, Any]:
        """For a result row."""
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


def nothing() -> None:
    """What most calls need before they are timed."""


@dataclass(frozen=True)
class Timed:
    """A call, and what must be done before each of its repeats (outside the timed region)."""

    call: Callable[[], object]
    prepare: Callable[[], object] = nothing


class Clock:
    """Times calls on one device as a plan says."""

    def __init__(self, plan: Plan) -> None:
        self.device = torch.device(plan.device)
        self.seconds = plan.case_seconds
        self.least, self.most = plan.repeats
        self._flush = torch.zeros(plan.flush_bytes, dtype=torch.uint8, device=self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, call: Callable[[], object], prepare: Callable[[], object] = nothing) -> Times:
        return self.in_turn([Timed(call, prepare)])[0]

    def in_turn(self, calls: Sequence[Timed]) -> list[Times]:
        """Two passes over all calls, so that a slow spell falls on all alike and shows in the spread."""
        for timed in calls:
            self._pass(timed, 2, 2)  # warm: compiled, allocated, clocks up
        first, second = ([self._pass(timed, self.least, self.most) for timed in calls] for _ in range(2))
        return [times_of(a, b) for a, b in zip(first, second, strict=True)]

    def _pass(self, timed: Timed, least: int, most: int) -> list[float]:
        one = self._queue if self.device.type == "cuda" else self._run
        begun = time.monotonic()
        taken: list[Callable[[], float]] = []
        while len(taken) < most and (len(taken) < least or time.monotonic() - begun < self.seconds):
            timed.prepare()
            self._flush.add_(1)
            taken.append(one(timed.call))
            if len(taken) % SYNC_EVERY == 0:
                self.synchronize()
        self.synchronize()
        return [value() for value in taken]

    def _queue(self, call: Callable[[], object]) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        return lambda: float(begin.elapsed_time(end))

    def _run(self, call: Callable[[], object]) -> Callable[[], float]:
        start = time.perf_counter()
        call()
        elapsed = (time.perf_counter() - start) * 1e3
        return lambda: elapsed


def times_of(first: Sequence[float], second: Sequence[float]) -> Times:
    """Statistics of two passes."""
    a, b = statistics.median(first), statistics.median(second)
    every = [*first, *second]
    spread = abs(a - b) / min(a, b) if min(a, b) > 0 else 0.0
    return Times(statistics.median(every), a, b, min(every), spread, len(every))


def host_microseconds(call: Callable[[], object], calls: int, synchronize: Callable[[], None]) -> float:
    """Time that the host takes to queue a call, while the device is not waited for. `calls` must fit the launch queue."""
    for _ in range(5):
        call()
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    synchronize()
    return elapsed / calls * 1e6
