"""What runs here, and why not what does not: `python -m vcpo_kernels.env`. Paste its output into a bug report.

Every probe is guarded: a broken driver, library or compiler becomes a line of text.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable

import torch

from vcpo_kernels import _version
from vcpo_kernels.core import registry

VARIABLES = ("VCPO_CPU_ISA", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLIBC_TUNABLES")


def guarded(probe: Callable[[], str]) -> str:
    """The probe's text, or what it raised."""
    try:
        return probe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def _isa() -> str:
    native = importlib.import_module("vcpo_kernels._native")
    threads = "OpenMP" if native.openmp else "one thread only: built without OpenMP"
    return f"{native.isa_chosen()} of {', '.join(native.isa_available())} ({threads})"


def _cuda_kernels() -> str:
    native = importlib.import_module("vcpo_kernels._native")
    return "built in" if native.cuda else "not built: there was no nvcc"


def _cuda_devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        names.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs)"
        )
    return "; ".join(names)


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not found"
    text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    release = [line for line in text.splitlines() if "release" in line]
    return release[0].split("release")[-1].strip() if release else "found"


def backend_lines() -> list[tuple[str, str]]:
    """Each backend on each kind of device it could serve: "available", or every reason why not."""
    lines = []
    for name in registry.BACKENDS:
        for kind in ("cpu", "cuda"):
            if kind == "cuda" and not torch.cuda.is_available():
                status = "no CUDA device"
            else:
                reasons = registry.objections(name, "token_stats", torch.device(kind), torch.float32)
                status = "; ".join(reasons) or "available"
            chosen = registry.ORDER.get(kind, registry.DEFAULT_ORDER)[0] == name and status == "available"
            lines.append((f"{name} on {kind}", status + (" (default)" if chosen else "")))
    return lines


def report() -> list[tuple[str, str]]:
    """(what, value) pairs, in print order."""
    probes: list[tuple[str, Callable[[], str]]] = [
        ("vcpo_kernels", lambda: _version.__version__),
        ("python", platform.python_version),
        ("platform", platform.platform),
        ("torch", lambda: f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", lambda: _version_of("triton")),
        ("cpu", _cpu),
        ("instruction set", _isa),
        ("cuda kernels", _cuda_kernels),
        ("cuda devices", _cuda_devices),
        ("nvcc", _nvcc),
    ]
    lines = [(name, guarded(probe)) for name, probe in probes]
    lines += [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    try:
        lines += backend_lines()
    except Exception as error:
        lines.append(("backends", f"unknown ({type(error).__name__}: {error})"))
    return lines


def main() -> None:
    """Print the report."""
    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
