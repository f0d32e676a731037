"""Runs the plan's phases, each in a process group of its own that is killed when its time is up."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.plan import BROKEN, Phase, Plan

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
TAIL = 2000


@dataclass(frozen=True)
class Outcome:
    """How a phase ended. tail: the last of what it printed."""

    phase: str
    status: str
    seconds: float
    returncode: int | None
    tail: str


@dataclass(frozen=True)
class Workplace:
    """Where commands run: on a GPU machine a copy of tests and benchmarks beside the package as it was installed.

    In the source folder Python would import the source's vcpo_kernels, which has no compiled extension.
    """

    plan: Plan
    out: Path

    @property
    def build(self) -> Path:
        return ROOT / "build" / "gpu"

    @property
    def folder(self) -> Path:
        return self.build / "stage" if self.plan.builds else ROOT

    @property
    def site(self) -> Path:
        return self.build / "site"

    def environment(self) -> dict[str, str]:
        env = dict(os.environ)
        bins = [str(Path(sys.executable).parent), env.get("PATH", ""), "/usr/local/cuda/bin"]
        env["PATH"] = os.pathsep.join(bins)
        env["PYTHONUNBUFFERED"] = "1"
        if self.plan.builds:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self.site), env.get("PYTHONPATH")]))
        env["GPU_TEST_DEVICE" if self.plan.dry else "VCPO_TEST_DEVICE"] = self.plan.device
        return env

    def stage(self) -> None:
        """Copies what the commands need besides the package."""
        if not self.plan.builds:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in ("benchmarks", "tests"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.folder)


def run_command(command: list[str], log: Path, seconds: float, cwd: Path, env: dict[str, str], name: str) -> Outcome:
    """Run a command with all its output in `log`; kill it and its children after `seconds`."""
    started = time.monotonic()
    offset = log.stat().st_size if log.exists() else 0
    with open(log, "ab") as file:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            returncode: int | None = process.wait(max(seconds, 0.01))
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            end_group(process)
    with open(log, "rb") as file:
        file.seek(offset)
        tail = file.read().decode(errors="replace")[-TAIL:]
    status = TIMED_OUT if returncode is None else PASSED if returncode == 0 else FAILED
    return Outcome(name, status, time.monotonic() - started, returncode, tail)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the command's process group, politely first."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
            if not group_is_alive(process.pid):
                return


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def command_of(phase: Phase, place: Workplace, seconds: float) -> tuple[list[str], str]:
    """The command of a phase, and the log file that takes its output."""
    plan, out = place.plan, str(place.out)
    python = [sys.executable, "-m"]
    module = {"environment": "environment", "build": "build", "sanitizer": "sanitizer"}.get(phase.name)
    if module is not None:
        log = "sanitizer.log" if phase.name == "sanitizer" else "run.log"
        return [*python, f"benchmarks.gpu.{module}", "--out", out, "--plan", plan.name], log
    if phase.name == "tests":
        workers = ["-n", str(plan.test_workers)] if plan.test_workers and has_module("xdist") else []
        return [*python, "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow", *workers,
                *plan.tests], "tests.log"  # fmt: skip
    budget = str(max(seconds - 5, 1.0))  # a part that ends by itself says what it left out
    return [
        *python,
        "benchmarks.gpu.bench",
        phase.name,
        "--out",
        out,
        "--plan",
        plan.name,
        "--seconds",
        budget,
    ], "run.log"


def has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def run_phase(phase: Phase, place: Workplace, left: float) -> Outcome:
    """One phase, again for as long as a benchmark part says that an error took the device from it."""
    until = time.monotonic() + (left if phase.takes_rest else min(phase.seconds, left))
    # The build runs from the source; everything else where its results are.
    while True:
        seconds = until - time.monotonic()
        if seconds < 1:
            return Outcome(phase.name, NOT_RUN, 0.0, None, "no time was left for it")
        command, log = command_of(phase, place, seconds)
        cwd = ROOT if phase.name in ("build", "environment") else place.folder
        outcome = run_command(command, place.out / log, seconds, cwd, place.environment(), phase.name)
        if outcome.returncode != BROKEN:
            return outcome
