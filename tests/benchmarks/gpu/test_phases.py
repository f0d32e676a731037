"""Phases end when their time is up."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.gpu import phases
from benchmarks.gpu.plan import DRY, Phase


def test_a_phase_is_killed_with_its_children(tmp_path: Path) -> None:
    """What it wrote stays; a grandchild that ignores SIGTERM does not."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    outcome = phases.run_command([sys.executable, "-c", parent], tmp_path / "log", 1.5, tmp_path, {}, "slow")
    assert outcome.status == phases.TIMED_OUT
    assert "begun" in outcome.tail
    assert time.monotonic() - started < 20


def test_a_phase_without_time_is_not_run(tmp_path: Path) -> None:
    outcome = phases.run_phase(Phase("shapes", 45), phases.Workplace(DRY, tmp_path), left=0.2)
    assert outcome.status == phases.NOT_RUN
