"""Measures one part of the plan and appends to the result file: python -m benchmarks.gpu.bench PART --out FOLDER.

Nothing is timed before its result agrees with float64. Where the device itself is lost to an error, the process ends with
BROKEN, and the next one goes on with what has not been tried.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

import vcpo_kernels as vk
from benchmarks.gpu import head_cases, peers, row_cases, sequence_cases
from benchmarks.gpu.clock import Clock, Timed, nothing
from benchmarks.gpu.plan import PLANS, Plan, Shape
from benchmarks.gpu.results import BROKEN, ResultLog, Row, key_of
from benchmarks.gpu.row_cases import Oracle, RowCase
from benchmarks.token_stats_cases import Inputs
from vcpo_kernels.core import registry

COPY = "device copy"
MEMORY_SHARE = 0.9  # of what is free


@dataclass
class Bench:
    """What every job needs: the plan, the clock, where results go, and when to stop."""

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


# --- rows ------------------------------------------------------------------------------------------------------------


def shape_fields(shape: Shape) -> Row:
    return {"rows": shape.rows, "vocabulary": shape.vocabulary, "dtype": shape.dtype}


def rows_job(bench: Bench, shape: Shape, cases: tuple[RowCase, ...]) -> None:
    """The device's own copy, then every case on every backend, in turn."""
    dtype = row_cases.TORCH_DTYPES[shape.dtype]
    todo = []
    for case in cases:
        for backend in bench.plan.backends:
            fields = {
                "work": case.work,
                "name": backend,
                **shape_fields(shape),
                "op": case.op,
                "floor_nv": case.floor_nv,
            }
            if bench.skips(fields):
                continue
            if reason := objections(bench.plan, backend, case.op, dtype):
                bench.add("left out", {**fields, "reason": reason})
            elif case.buffers * shape.bytes > bench.free_bytes():
                bench.add("left out", {**fields, "reason": f"needs {case.buffers} x {shape.bytes / 2**30:.0f} GiB"})
            else:
                todo.append((case, backend, fields))
    if not todo:
        return
    x = row_cases.make_inputs(shape, bench.device)
    oracle = row_cases.oracle_of(x)
    scratch = torch.empty_like(x.logits) if any(c.inplace for c, *_ in todo) else None
    copy_gb_per_s = measured_copy(bench, shape, x, scratch)
    verified = [
        (fields, timed)
        for case, backend, fields in todo
        if (timed := verified_case(bench, case, backend, fields, x, scratch, oracle)) is not None
    ]
    time_in_turn(bench, shape, verified, copy_gb_per_s)


def measured_copy(bench: Bench, shape: Shape, x: Inputs, scratch: torch.Tensor | None) -> float | None:
    """GB/s, read plus written, of a copy of the logits; of a quarter of them where there is no second buffer."""
    fields: Row = {"work": "copy", "name": COPY, **shape_fields(shape), "floor_nv": 2}
    known = [r for r in bench.log.rows() if r["kind"] == "time" and key_of(r) == key_of(fields)]
    if known:
        return float(known[-1]["gb_per_s"])
    source = x.logits.view(-1)
    target = scratch.view(-1) if scratch is not None else torch.empty_like(source[: source.numel() // 4])
    source = source[: target.numel()]
    times = bench.clock.measure(lambda: target.copy_(source))
    gb_per_s = 2 * source.numel() * source.element_size() / times.median_ms / 1e6
    bench.add("time", {**fields, **times.fields(), "gb_per_s": round(gb_per_s, 2)})
    return gb_per_s


def verified_case(
    bench: Bench, case: RowCase, backend: str, fields: Row, x: Inputs, scratch: torch.Tensor | None, oracle: Oracle
) -> Timed | None:
    """The case ready to be timed, or None where it is wrong or raises."""

    def ready() -> tuple[Timed, float]:
        on = x
        prepare: Callable[[], object] = nothing
        if case.inplace:
            assert scratch is not None
            on = Inputs(scratch, x.token_ids, x.g)
            prepare = partial(scratch.copy_, x.logits)

        def call() -> Any:
            with vk.use_backend(backend):
                return case.run(on)

        prepare()
        return Timed(call, prepare), oracle.error(case, call())

    if (result := bench.guarded(fields, ready)) is None:
        return None
    timed, error = cast(tuple[Timed, float], result)
    bound = row_cases.error_bound(case, backend, x.logits.dtype)
    if not error <= bound:
        reason = f"wrong: error {error:.2e} against float64 is over the bound {bound:.0e}"
        bench.add("failure", {**fields, "reason": reason, "max_error": error})
        return None
    fields["max_error"] = error
    return timed


def time_in_turn(bench: Bench, shape: Shape, verified: list[tuple[Row, Timed]], copy_gb_per_s: float | None) -> None:
    """Times all cases together and writes a row for each."""
    if not verified:
        return
    first = verified[0][0]
    times = bench.guarded({**first, "name": "timing"}, lambda: bench.clock.in_turn([t for _, t in verified]))
    for (fields, _), result in zip(verified, times or [], strict=False):
        gb_per_s = fields["floor_nv"] * shape.bytes / result.median_ms / 1e6
        row = {**fields, **result.fields(), "gb_per_s": round(gb_per_s, 2)}
        if copy_gb_per_s:
            row["of_copy"] = round(gb_per_s / copy_gb_per_s, 4)
        bench.add("time", row)


# --- parts -----------------------------------------------------------------------------------------------------------


def headline(bench: Bench) -> None:
    """What the targets are about."""
    rows_job(bench, bench.plan.headline, row_cases.CASES)
    sequence_cases.coefficients_job(bench)
    sequence_cases.launch_job(bench)
    head_cases.head_job(bench)


def peers_part(bench: Bench) -> None:
    """What others have, on the same inputs."""
    peers.rows_job(bench)
    peers.head_job(bench)
    peers.compiled_job(bench)


def shapes(bench: Bench) -> None:
    """The rest of the grid, most important first, until the time is up."""
    for shape in bench.plan.shapes:
        rows_job(bench, shape, row_cases.GRID)


PARTS: dict[str, Callable[[Bench], None]] = {"headline": headline, "peers": peers_part, "shapes": shapes}


def main(arguments: list[str] | None = None) -> None:
    """Run one part for `--seconds`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=main.__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", choices=PLANS, default="gpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    plan, log = PLANS[options.plan], ResultLog(options.out)
    bench = Bench(plan, Clock(plan), log, started + options.seconds, log.known())
    PARTS[options.part](bench)


if __name__ == "__main__":
    main()
