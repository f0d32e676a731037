"""environment.json: device, driver, compilers and versions, each probe guarded."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

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


def main() -> None:
    """Write environment.json to --out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", default="gpu")
    options = parser.parse_args()
    report = {
        "plan": options.plan,
        "python": platform.python_version(),
        "devices": devices(),
        "packages": {p: version_of(p) for p in PACKAGES},
        **{name: output_of(command) for name, command in COMMANDS.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "environment.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
