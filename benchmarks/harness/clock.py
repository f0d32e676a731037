"""Timing on a CPU or a GPU: calls that find a cold cache, medians, several calls in turn.

Before every timed call a buffer larger than the cache is rewritten. On a GPU that also keeps the device busy while the host
queues the call behind it, so that what is timed, by events around the call, is the device's work and not the host's.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # well over the last-level cache of the machines this runs on
# What a result row holds of a call's times.
OF_ROUNDS = ("median_ms", "fastest_ms", "slowest_ms", "repeats")
OF_PASSES = ("median_ms", "first_ms", "second_ms", "fastest_ms", "spread", "repeats")
SYNC_EVERY = 8  # calls that may be queued: the host must not run ahead of the time it was given


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, pass by pass; a clock of rounds has one pass."""

    passes: tuple[Sequence[float], ...]

    @property
    def _every(self) -> list[float]:
        return [t for of_pass in self.passes for t in of_pass]

    @property
    def median_ms(self) -> float:
        return statistics.median(self._every)

    @property
    def first_ms(self) -> float:
        return statistics.median(self.passes[0])

    @property
    def second_ms(self) -> float:
        return statistics.median(self.passes[1])

    @property
    def fastest_ms(self) -> float:
        return min(self._every)

    @property
    def slowest_ms(self) -> float:
        return max(self._every)

    @property
    def spread(self) -> float:
        """How far apart two passes are."""
        a, b = self.first_ms, self.second_ms
        return abs(a - b) / min(a, b) if min(a, b) > 0 else 0.0

    @property
    def repeats(self) -> int:
        return len(self._every)

    def gb_per_s(self, moved: int) -> float:
        """Of so many bytes in one call."""
        return moved / self.median_ms / 1e6

    def fields(self, digits: int) -> dict[str, Any]:
        """For a result row."""
        values = {name: getattr(self, name) for name in (OF_ROUNDS if len(self.passes) == 1 else OF_PASSES)}
        return {name: round(v, digits) if isinstance(v, float) else v for name, v in values.items()}


def nothing() -> None:
    """What most calls need before they are timed."""


@dataclass(frozen=True)
class Timed:
    """A call, and what must be done before each of its repeats (outside the timed region)."""

    call: Callable[[], object]
    prepare: Callable[[], object] = nothing


class Clock(ABC):
    """Times calls on one device."""

    def __init__(self, device: torch.device, flush_bytes: int) -> None:
        self.device = device
        self._flush = torch.zeros(flush_bytes, dtype=torch.uint8, device=device)

    @abstractmethod
    def in_turn(self, calls: Sequence[Timed]) -> list[Times]:
        """Each call's times, taken so that a machine's slow spells fall on all alike; what warms a call up does not count."""

    def measure(self, call: Callable[[], object], prepare: Callable[[], object] = nothing) -> Times:
        return self.in_turn([Timed(call, prepare)])[0]

    def copy(self, source: Tensor, target: Tensor) -> tuple[Times, float]:
        """Times of `copy_` into memory that is there, and its GB/s, read plus written."""
        times = self.measure(lambda: target.copy_(source))
        return times, times.gb_per_s(2 * source.numel() * source.element_size())

    def host_microseconds(self, call: Callable[[], object], calls: int) -> float:
        """What queueing a call takes the host, which does not wait for the device. `calls` must fit the launch queue."""
        for _ in range(5):
            call()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter() - start
        self.synchronize()
        return elapsed / calls * 1e6

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start(self, timed: Timed) -> Callable[[], float]:
        """One call behind a flush; its milliseconds can be asked for once the device is done."""
        timed.prepare()
        self._flush.add_(1)
        return self._queue(timed.call) if self.device.type == "cuda" else self._run(timed.call)

    def _queue(self, call: Callable[[], object]) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        return lambda: float(begin.elapsed_time(end))

    def _run(self, call: Callable[[], object]) -> Callable[[], float]:
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # its memory goes back outside the timed region, as it does for every competitor
        return lambda: elapsed * 1e3


class Rounds(Clock):
    """`repeats` rounds of one call of each, every call waited for."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        super().__init__(device, FLUSH_BYTES)
        self.repeats = repeats

    def in_turn(self, calls: Sequence[Timed]) -> list[Times]:
        for timed in calls:
            for _ in range(2):
                timed.prepare()
                timed.call()
        rounds = [[self._once(timed) for timed in calls] for _ in range(self.repeats)]
        return [Times((of_call,)) for of_call in zip(*rounds, strict=True)]

    def _once(self, timed: Timed) -> float:
        milliseconds = self._start(timed)
        self.synchronize()
        return milliseconds()


class Passes(Clock):
    """Two passes over all calls, each repeated from `repeats[0]` to `repeats[1]` times for about so many seconds.

    Calls are queued behind one another; what fell on one pass alone shows in the spread.
    """

    def __init__(self, device: torch.device, seconds: float, repeats: tuple[int, int], flush_bytes: int) -> None:
        super().__init__(device, flush_bytes)
        self.seconds = seconds
        self.least, self.most = repeats

    def in_turn(self, calls: Sequence[Timed]) -> list[Times]:
        for timed in calls:
            self._pass(timed, 2, 2)  # warm: compiled, allocated, clocks up
        first, second = ([self._pass(timed, self.least, self.most) for timed in calls] for _ in range(2))
        return [Times(pair) for pair in zip(first, second, strict=True)]

    def _pass(self, timed: Timed, least: int, most: int) -> list[float]:
        begun = time.monotonic()
        taken: list[Callable[[], float]] = []
        while len(taken) < most and (len(taken) < least or time.monotonic() - begun < self.seconds):
            taken.append(self._start(timed))
            if len(taken) % SYNC_EVERY == 0:
                self.synchronize()
        self.synchronize()
        return [value() for value in taken]
