"""The fused head against the bare GEMMs of its size, and what others have in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

import vcpo_kernels as vk
from benchmarks.cases import head
from benchmarks.cases.case import Case
from benchmarks.cases.head import HEAD, BareGemms, Gradients, HeadInputs
from benchmarks.gpu.jobs.workbench import Workbench, objections
from benchmarks.gpu.plan import Plan
from benchmarks.harness.clock import Timed, Times
from benchmarks.harness.results import Row, key_of

MEMORY = {"fast": head.FAST, "lean": head.LEAN}
ORACLE_ROWS = 512  # float64 logits of so many rows at a time

HeadCase = Case[HeadInputs]


def ours(bench: Workbench) -> None:
    """Both memory modes, with each backend's row kernels."""
    plan = bench.plan
    cases = []
    for memory, mode in MEMORY.items():
        for backend in plan.backends:
            case = replace(mode, name=f"{backend}, {memory}", run=partial(_on_backend, backend, mode))
            obstacle = partial(objections, plan, backend, mode.op, plan.headline.torch_dtype)
            if bench.takes(fields_of(plan, case), obstacle):
                cases.append(case)
    measure(bench, cases)


def peers(bench: Workbench, cases: Sequence[HeadCase]) -> None:
    """One after another, as the peers on rows."""
    for case in cases:
        if bench.takes(fields_of(bench.plan, case), partial(case.missing, bench.device)):
            measure(bench, [case])


def _on_backend(backend: str, mode: HeadCase, x: HeadInputs) -> Gradients:
    with vk.use_backend(backend):
        gradients: Gradients = mode.run(x)
        return gradients


def row_of(plan: Plan, name: str, gemms: int) -> Row:
    return {"work": HEAD, "name": name, **plan.headline.fields(), "hidden": plan.hidden, "gemms": gemms}


def fields_of(plan: Plan, case: HeadCase) -> Row:
    return row_of(plan, case.name, case.gemms) | ({} if case.ours else {"peer": True})


def measure(bench: Workbench, cases: Sequence[HeadCase]) -> None:
    """Verify each, then time all of them and the bare GEMMs in turn."""
    if not cases:
        return
    plan = bench.plan
    shape = plan.headline
    x = head.make_inputs(shape.rows, plan.hidden, shape.vocabulary, shape.torch_dtype, bench.device)
    right = verified(bench, x, cases)
    gemms = BareGemms(x)
    counts = sorted({mode.gemms for mode in MEMORY.values()})
    bare = [(row_of(plan, BareGemms.name(n), n), Timed(partial(gemms.run, n))) for n in counts]
    timed = bare + [(fields, Timed(partial(case.run, x))) for fields, case in right]
    times: list[Times] | None = bench.guarded(
        row_of(plan, "timing", 0), lambda: bench.clock.in_turn([call for _, call in timed])
    )
    if times is None:
        return
    of_bare = {n: of_gemms.median_ms for n, of_gemms in zip(counts, times, strict=False)}
    for (fields, _), of_case in zip(timed, times, strict=True):
        if key_of(fields) not in bench.known:  # the bare GEMMs are timed again beside every peer
            ratio = round(of_case.median_ms / of_bare[fields["gemms"]], 4)
            bench.add("time", {**fields, **of_case.fields(digits=5), "of_bare": ratio})


def verified(bench: Workbench, x: HeadInputs, cases: Sequence[HeadCase]) -> list[tuple[Row, HeadCase]]:
    """The cases whose gradients agree with float64; the others become rows that say so."""
    exact = bench.guarded(row_of(bench.plan, "float64", 0), lambda: head.oracle(x, rows=ORACLE_ROWS))
    if exact is None:
        return []
    right = []
    for case in cases:
        fields = fields_of(bench.plan, case)
        error: float | None = bench.guarded(fields, partial(_error_of, case, x, exact))
        if error is not None and not error <= head.ERROR_BOUND[x.hidden.dtype]:
            kind = "failure" if case.ours else "left out"
            bench.add(kind, {**fields, "reason": f"wrong: relative error {error:.2e} of its gradients"})
        elif error is not None:
            right.append(({**fields, "max_error": error}, case))
    return right


def _error_of(case: HeadCase, x: HeadInputs, exact: tuple[Tensor, Tensor]) -> float:
    return case.error(case.run(x), exact)
