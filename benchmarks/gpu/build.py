"""Installs the package from its source into build/gpu/site, offline, with the CUDA kernels for the GPU that is here."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.phases import Workplace
from benchmarks.gpu.plan import PLANS

# One architecture compiles in a fraction of the time of all. Others get the build's own list.
ARCHITECTURES = {(8, 0): "80-real", (9, 0): "90a-real", (10, 0): "100-real"}
# First all of it; what does not build is given up from left to right, so that the rest can still be measured.
ATTEMPTS = (
    ("with the CUDA kernels", "ON", "-DVCPO_CUDA=ON", 110.0),
    ("without the compiled extension", "OFF", "-DVCPO_CUDA=OFF", 40.0),
)


def architecture_flag() -> str:
    import torch

    found = ARCHITECTURES.get(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    return f" -DCMAKE_CUDA_ARCHITECTURES={found}" if found else ""


def install(site: Path, native: str, cmake_args: str, seconds: float) -> bool:
    """pip install into `site`; whether it worked within the time."""
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-index", "--no-build-isolation", "--no-deps",
               "--target", str(site), "."]  # fmt: skip
    env = {**os.environ, "VCPO_NATIVE": native, "CMAKE_ARGS": cmake_args}
    try:
        return subprocess.run(command, env=env, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    """Build and stage; fails where anything had to be given up."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", choices=PLANS, default="gpu")
    options = parser.parse_args()
    place = Workplace(PLANS[options.plan], options.out)
    if not place.plan.builds:
        import vcpo_kernels

        print(f"not built: vcpo_kernels {vcpo_kernels.__version__} as it is installed")
        return
    place.stage()
    for number, (what, native, cmake_args, seconds) in enumerate(ATTEMPTS):
        started = time.monotonic()
        if install(place.site, native, cmake_args + architecture_flag(), seconds):
            print(f"built {what} in {time.monotonic() - started:.0f} s")
            sys.exit(1 if number else 0)
        print(f"build {what} failed after {time.monotonic() - started:.0f} s")
    sys.exit(1)


if __name__ == "__main__":
    main()
