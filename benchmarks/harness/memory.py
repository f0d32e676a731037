"""Timing, peak memory and copy bandwidth, on a CPU or a GPU. Every timed call starts with a cold cache."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # well over the last-level cache of the machines this runs on
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, fastest and slowest of `repeats`."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self._flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def measure(self, call: Callable[[], object]) -> Timing:
        """Median of `repeats` calls after two that do not count, with the cache flushed before each."""
        return self.measure_in_turn([call])[0]

    def measure_in_turn(self, calls: Sequence[Callable[[], object]]) -> list[Timing]:
        """As `measure`, one call of each in turn, so that a machine's slow spells fall on all alike."""
        for call in calls:
            call()
            call()
        rounds = [[self._once(call) for call in calls] for _ in range(self.repeats)]
        return [Timing(statistics.median(t), min(t), max(t), self.repeats) for t in zip(*rounds, strict=True)]

    def _once(self, call: Callable[[], object]) -> float:
        self._flush.add_(1)
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # its memory goes back outside the timed region, as it does for every competitor
        return elapsed * 1e3

    def copy_gb_per_s(self, like: Tensor) -> float:
        """Bytes read plus written per second by `copy_` of a tensor of this size, memory already there."""
        source = like.detach().contiguous()
        target = source.clone()
        timing = self.measure(lambda: target.copy_(source))
        return 2 * source.numel() * source.element_size() / timing.median_ms / 1e6


def _status_kib(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {field}")


def _return_freed_memory() -> None:
    """What the allocator keeps of freed memory would hide as much of what a call needs."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def peak_extra_mib(device: torch.device, call: Callable[[], object]) -> float | None:
    """MiB that a call needs beyond what is allocated before it, its result included; None where that cannot be told."""
    call()  # whatever is allocated only once is allocated now
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
        before = _status_kib("VmRSS")
        call()
        return max(0, _status_kib("VmHWM") - before) / 2**10
    except (OSError, RuntimeError):
        return None
