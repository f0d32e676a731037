"""Rows of logits: ours on every backend, in turn, and the peers, each on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import vcpo_kernels as vk
from benchmarks.cases import rows
from benchmarks.cases.case import Case
from benchmarks.cases.rows import Oracle, RowInputs
from benchmarks.cases.shapes import Shape
from benchmarks.gpu.jobs.workbench import Workbench, objections
from benchmarks.harness.clock import Timed, nothing
from benchmarks.harness.results import Row, key_of

COPY = "device copy"
VERIFIED_ROWS = 16

RowCase = Case[RowInputs]


def ours(bench: Workbench, shape: Shape, cases: Sequence[RowCase]) -> None:
    """The device's own copy, then every case on every backend, in turn."""
    todo = []
    for case in cases:
        for backend in bench.plan.backends:
            fields = fields_of(case, backend, shape)
            if bench.takes(fields, partial(_obstacle, bench, case, backend, shape)):
                todo.append((case, backend, fields))
    if not todo:
        return
    x = rows.make_inputs_in_parts(shape, bench.device)
    want = rows.oracle(x, VERIFIED_ROWS)
    scratch = torch.empty_like(x.logits) if any(case.inplace for case, *_ in todo) else None
    copy_gb_per_s = measured_copy(bench, shape, x, scratch)
    verified = [
        (fields, timed)
        for case, backend, fields in todo
        if (timed := verified_case(bench, case, backend, fields, x, scratch, want)) is not None
    ]
    time_in_turn(bench, shape, verified, copy_gb_per_s)


def peers(bench: Workbench, cases: Sequence[RowCase]) -> None:
    """Written as soon as each is measured: a peer that hangs takes no other along."""
    shape = bench.plan.headline
    x = rows.make_inputs_in_parts(shape, bench.device)
    want = rows.oracle(x, VERIFIED_ROWS)
    scratch = torch.empty_like(x.logits)
    copy_gb_per_s = measured_copy(bench, shape, x, scratch)
    for case in cases:
        fields = fields_of(case, case.name, shape)
        if not bench.takes(fields, partial(_obstacle, bench, case, "", shape)):
            continue
        if (timed := verified_case(bench, case, "", fields, x, scratch, want)) is not None:
            time_in_turn(bench, shape, [(fields, timed)], copy_gb_per_s)


def fields_of(case: RowCase, name: str, shape: Shape) -> Row:
    fields: Row = {"work": case.work, "name": name, **shape.fields()}
    if case.ours:
        return {**fields, "op": case.op, "floor_nv": case.floor_nv}
    return {**fields, "floor_nv": case.floor_nv, "peer": True}


def _obstacle(bench: Workbench, case: RowCase, backend: str, shape: Shape) -> str:
    """Why a case cannot run, or nothing. backend: of ours."""
    dtype = shape.torch_dtype
    reason = objections(bench.plan, backend, case.op, dtype) if case.ours else case.missing(bench.device)
    if not reason and case.buffers * shape.bytes > bench.free_bytes():
        reason = f"needs {case.buffers} x {shape.bytes / 2**30:.0f} GiB"
    return reason


def measured_copy(bench: Workbench, shape: Shape, x: RowInputs, scratch: torch.Tensor | None) -> float | None:
    """GB/s, read plus written, of a copy of the logits; of a quarter of them where there is no second buffer."""
    fields: Row = {"work": "copy", "name": COPY, **shape.fields(), "floor_nv": 2}
    known = [r for r in bench.log.rows() if r["kind"] == "time" and key_of(r) == key_of(fields)]
    if known:
        return float(known[-1]["gb_per_s"])
    source = x.logits.view(-1)
    target = scratch.view(-1) if scratch is not None else torch.empty_like(source[: source.numel() // 4])
    times, gb_per_s = bench.clock.copy(source[: target.numel()], target)
    bench.add("time", {**fields, **times.fields(digits=5), "gb_per_s": round(gb_per_s, 2)})
    return gb_per_s


def verified_case(
    bench: Workbench, case: RowCase, backend: str, fields: Row, x: RowInputs, scratch: torch.Tensor | None, want: Oracle
) -> Timed | None:
    """The case ready to be timed, or None where it is wrong or raises."""
    on = x
    prepare: Callable[[], object] = nothing
    if case.inplace:
        assert scratch is not None
        on, prepare = RowInputs(scratch, x.token_ids, x.g), partial(scratch.copy_, x.logits)
    call = partial(_on_backend, backend, case, on) if case.ours else partial(case.run, on)

    def found() -> float:
        prepare()
        return case.error(call(), want)

    error: float | None = bench.guarded(fields, found)
    if error is None:
        return None
    bound = rows.error_bound(case, backend, x.logits.dtype)
    if not error <= bound:
        if case.ours:
            reason = f"wrong: error {error:.2e} against float64 is over the bound {bound:.0e}"
            bench.add("failure", {**fields, "reason": reason, "max_error": error})
        else:
            bench.add("left out", {**fields, "reason": f"another function: error {error:.2e} against float64"})
        return None
    fields["max_error"] = error
    return Timed(call, prepare)


def _on_backend(backend: str, case: RowCase, x: RowInputs) -> Any:
    with vk.use_backend(backend):
        return case.run(x)


def time_in_turn(
    bench: Workbench, shape: Shape, verified: list[tuple[Row, Timed]], copy_gb_per_s: float | None
) -> None:
    """Times all cases together and writes a row for each."""
    if not verified:
        return
    first = verified[0][0]
    times = bench.guarded({**first, "name": "timing"}, lambda: bench.clock.in_turn([t for _, t in verified]))
    for (fields, _), of_case in zip(verified, times or [], strict=False):
        gb_per_s = of_case.gb_per_s(fields["floor_nv"] * shape.bytes)
        row = {**fields, **of_case.fields(digits=5), "gb_per_s": round(gb_per_s, 2)}
        if copy_gb_per_s:
            row["of_copy"] = round(gb_per_s / copy_gb_per_s, 4)
        bench.add("time", row)
