"""What every job needs: the plan, the clock, where results go, and when to stop."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.plan import BROKEN, Plan
from benchmarks.harness.clock import Clock, Passes
from benchmarks.harness.results import ResultLog, Row, key_of
from vcpo_kernels.core import registry

MEMORY_SHARE = 0.9  # of what is free


def clock_of(plan: Plan) -> Clock:
    return Passes(torch.device(plan.device), plan.case_seconds, plan.repeats, plan.flush_bytes)


@dataclass
class Workbench:
    """known: keys of what needs no second try."""

    plan: Plan
    clock: Clock
    log: ResultLog
    deadline: float
    known: set[tuple[Any, ...]] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def add(self, kind: str, fields: Row) -> None:
        row = self.log.add(kind, **fields, device=self.device.type)
        self.known.add(key_of(row))

    def skips(self, fields: Row) -> bool:
        """Whether this has been done, or the time is up (which is then said)."""
        if key_of(fields) in self.known:
            return True
        if time.monotonic() < self.deadline:
            return False
        self.add("left out", {**fields, "reason": "out of time"})
        return True

    def takes(self, fields: Row, obstacle: Callable[[], str]) -> bool:
        """Whether this is to be run: not skipped, and with nothing in its way (which is said otherwise)."""
        if self.skips(fields):
            return False
        reason = obstacle()
        if reason:
            self.add("left out", {**fields, "reason": reason})
        return not reason

    def guarded(self, fields: Row, call: Callable[[], Any]) -> Any:
        """call(), or None after its error has become a row."""
        try:
            return call()
        except torch.OutOfMemoryError:
            self.add("left out", {**fields, "reason": "out of memory"})
        except Exception as error:
            lines = traceback.format_exception_only(type(error), error)
            kind = "left out" if fields.get("peer") else "failure"  # what a peer cannot do is no failure of ours
            self.add(kind, {**fields, "reason": lines[-1].strip()[:500]})
            self.end_if_broken()
        return None

    def end_if_broken(self) -> None:
        """An illegal access takes the whole context along: every later call would fail for its sake."""
        try:
            self.clock.synchronize()
        except Exception:
            sys.exit(BROKEN)

    def free_bytes(self) -> float:
        if self.device.type != "cuda":
            return float("inf")
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0] * MEMORY_SHARE


def objections(plan: Plan, backend: str, op: str, dtype: torch.dtype) -> str:
    """Why a backend cannot serve here, or nothing."""
    if backend not in registry.BACKENDS:
        return f"no backend {backend}"
    return "; ".join(registry.objections(backend, op, torch.device(plan.device), dtype))
