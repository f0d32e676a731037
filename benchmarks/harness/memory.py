"""What a call needs of memory, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


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
