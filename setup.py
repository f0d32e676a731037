"""Builds vcpo_kernels._native with CMake and Ninja. Everything else is declared in pyproject.toml.

Environment: VCPO_NATIVE=OFF installs without the compiled extension (the reference and triton backends still work);
CMAKE_ARGS is passed on (-DVCPO_CUDA=OFF leaves the CUDA kernels out, =ON insists on them); MAX_JOBS limits parallel
compilation.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_COMPILER_HINT = """
vcpo_kernels: building the compiled extension failed (see above).
  It needs a C++17 compiler: apt-get install g++, or dnf install gcc-c++; set CXX to choose one.
  If it was nvcc that failed, leave its kernels out (Triton then serves GPUs): CMAKE_ARGS=-DVCPO_CUDA=OFF
  To install without any compiler (the CPU then falls back to slow eager torch): VCPO_NATIVE=OFF
  Both are environment variables: put them before the same command, as in `VCPO_NATIVE=OFF pip install -e .`
"""


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # Named each time: pip builds in a new environment, and the cache of the last one points into what is gone.
        ninja = shutil.which("ninja") or "ninja"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS")
        compile_ = ["cmake", "--build", str(build), *(["--parallel", jobs] if jobs else [])]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(compile_, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"{error}\n{NO_COMPILER_HINT}") from None


native = os.environ.get("VCPO_NATIVE", "ON").upper() not in ("OFF", "0", "NO", "FALSE")
setup(
    ext_modules=[CMakeExtension("vcpo_kernels._native")] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
