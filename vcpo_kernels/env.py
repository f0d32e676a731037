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
from vcpo_kernels.core import installation, registry

VARIABLES = ("VCPO_CPU_ISA", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLIBC_TUNABLES")
NO_EXTENSION = 'none: the compiled extension does not load, see "native on cpu" below'


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


def _imported_from() -> str:
    kind = "a source folder" if installation.is_source() else "installed"
    hidden = installation.hidden_installation() if registry.native_problem() is not None else None
    return f"{installation.PACKAGE} ({kind}{f', which hides the installed {hidden}' if hidden else ''})"


def _triton() -> str:
    version = _version_of("triton")
    if (problem := registry.triton_problem()) is None:
        return version
    if torch.cuda.is_available():
        means = "CUDA tensors are left to the other backends"
    else:
        means = "nothing is lost here, for without a GPU it serves tests alone"
    if version == "not installed":
        return f"not installed: {means}. To have it: `pip install triton` (Linux only)"
    return f"{version}, but {problem}; {means}"


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def _isa() -> str:
    if registry.native_problem() is not None:
        return NO_EXTENSION
    native = importlib.import_module("vcpo_kernels._native")
    threads = "OpenMP" if native.openmp else "one thread only: built without OpenMP"
    return f"{native.isa_chosen()} of {', '.join(native.isa_available())} ({threads})"


def _cuda_kernels() -> str:
    if registry.native_problem() is not None:
        return NO_EXTENSION
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
    """Each backend on each kind of device, in the order of preference: "available", or every reason why not."""
    lines = []
    taken: set[str] = set()  # kinds of device that have their default
    for kind in ("cpu", "cuda"):
        order = registry.ORDER.get(kind, registry.DEFAULT_ORDER)
        for name in sorted(registry.BACKENDS, key=lambda n: order.index(n) if n in order else len(order)):
            if kind == "cuda" and not torch.cuda.is_available():
                status = "no CUDA device"
            else:
                reasons = registry.objections(name, "token_stats", torch.device(kind), torch.float32)
                status = "; ".join(reasons) or "available"
            if status == "available" and name in order and kind not in taken:
                taken.add(kind)
                status += " (default)"
            lines.append((f"{name} on {kind}", status))
    return lines


def report() -> list[tuple[str, str]]:
    """(what, value) pairs, in print order."""
    probes: list[tuple[str, Callable[[], str]]] = [
        ("vcpo_kernels", lambda: _version.__version__),
        ("imported from", _imported_from),
        ("python", platform.python_version),
        ("platform", platform.platform),
        ("torch", lambda: f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", _triton),
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
