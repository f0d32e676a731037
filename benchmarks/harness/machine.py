"""What machine it was: device, driver, compilers and versions, each probe guarded.

`make gpu` asks before the package is built, so nothing is imported before it is needed.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ENVIRONMENT = "environment.txt"
PACKAGES = ("torch", "triton", "numpy", "pytest", "hypothesis", "transformers", "liger-kernel", "quack-kernels",
            "cut-cross-entropy", "flash-attn")  # fmt: skip
COMMANDS = {
    "nvidia-smi": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv"],
    "nvcc": ["nvcc", "--version"],
    "ptxas": ["ptxas", "--version"],
    "cmake": ["cmake", "--version"],
    "compute-sanitizer": ["compute-sanitizer", "--version"],
}


def output_of(command: list[str]) -> str:
    """What a command prints, or why it could not be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return (done.stdout or done.stderr).strip()


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[dict[str, object]]:
    """Each GPU's name, compute capability, multiprocessors, memory and L2 cache."""
    import torch

    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        found.append({"name": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count,
                      "memory_bytes": p.total_memory, "l2_bytes": getattr(p, "L2_cache_size", None)})  # fmt: skip
    return found


def description() -> dict[str, object]:
    """Everything that environment.json says besides the plan."""
    return {
        "python": platform.python_version(),
        "devices": devices(),
        "packages": {p: version_of(p) for p in PACKAGES},
        **{name: output_of(command) for name, command in COMMANDS.items()},
    }


def environment() -> str:
    """environment.txt, as the package itself reports it, but for the folder: it is committed, and says what machine it was."""
    from vcpo_kernels import env

    return "".join(f"{name}: {value}\n" for name, value in env.report() if name != "imported from")


def read_environment(folder: Path) -> dict[str, str]:
    """A committed environment.txt by name."""
    return dict(line.split(": ", 1) for line in (folder / ENVIRONMENT).read_text().splitlines())


def slug(device: torch.device) -> str:
    """A folder name for the machine: its GPU, or its CPU with the instruction set."""
    import torch

    from vcpo_kernels import env

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else dict(env.report())["cpu"].split(",")[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
