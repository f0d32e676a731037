"""The fused head against the bare GEMMs of its size, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

import vcpo_kernels as vk
from benchmarks.gpu.clock import Timed, Times
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.results import Row, key_of
from benchmarks.gpu.row_cases import TORCH_DTYPES
from benchmarks.linear_cases import BareGemms, Gradients, LinearInputs, oracle, ours, relative_error

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

HEAD = "fused head, forward + backward"
GEMMS = {"fast": 3, "lean": 4}
# Of both gradients, relative L2: what rounding the logits costs, three times over.
ERROR_BOUND = {torch.bfloat16: 1e-2, torch.float32: 5e-6}
ORACLE_ROWS = 512  # float64 logits of so many rows at a time


def make_head(plan: Plan) -> LinearInputs:
    """Logits of standard deviation 3; g as a mean over tokens has it."""
    shape, device = plan.headline, torch.device(plan.device)
    generator = torch.Generator(device).manual_seed(0)
    dtype = TORCH_DTYPES[shape.dtype]
    hidden = torch.randn(shape.rows, plan.hidden, generator=generator, device=device).to(dtype)
    weight = torch.randn(shape.vocabulary, plan.hidden, generator=generator, device=device)
    weight = weight.mul_(3 / plan.hidden**0.5).to(dtype)
    ids = torch.randint(0, shape.vocabulary, (shape.rows,), generator=generator, device=device)
    g = torch.randn(shape.rows, generator=generator, device=device) / shape.rows
    return LinearInputs(hidden, weight, ids, None, g)


def head_fields(plan: Plan, name: str, gemms: int) -> Row:
    shape = plan.headline
    return {"work": HEAD, "name": name, "rows": shape.rows, "vocabulary": shape.vocabulary, "dtype": shape.dtype,
            "hidden": plan.hidden, "gemms": gemms}  # fmt: skip


def bare_name(gemms: int) -> str:
    return f"{gemms} bare GEMMs"


HeadCase = tuple[Row, Callable[[LinearInputs], Gradients]]


def head_job(bench: Bench) -> None:
    """Both memory modes, with each backend's row kernels."""
    from benchmarks.gpu.bench import objections

    plan = bench.plan
    dtype = TORCH_DTYPES[plan.headline.dtype]
    cases: list[HeadCase] = []
    for memory, gemms in GEMMS.items():
        for backend in plan.backends:
            fields = head_fields(plan, f"{backend}, {memory}", gemms)
            if bench.skips(fields):
                continue
            if reason := objections(plan, backend, "score_rows", dtype):
                bench.add("left out", {**fields, "reason": reason})
                continue
            cases.append((fields, partial(on_backend, backend, memory)))
    measure(bench, cases)


def on_backend(backend: str, memory: str, x: LinearInputs) -> Gradients:
    with vk.use_backend(backend):
        return ours(x, memory=memory)


def measure(bench: Bench, cases: list[HeadCase]) -> None:
    """Verify each, then time all of them and the bare GEMMs in turn."""
    if not cases:
        return
    plan = bench.plan
    x = make_head(plan)
    right = verified(bench, x, cases)
    gemms = BareGemms(x)
    bare = [(head_fields(plan, bare_name(n), n), partial(gemms.run, n)) for n in sorted(set(GEMMS.values()))]
    timed = bare + [(fields, partial(run, x)) for fields, run in right]
    calls = [Timed(call) for _, call in timed]
    times: list[Times] | None = bench.guarded(head_fields(plan, "timing", 0), lambda: bench.clock.in_turn(calls))
    if times is None:
        return
    of_bare = {fields["gemms"]: t.median_ms for (fields, _), t in zip(bare, times, strict=False)}
    for (fields, _), result in zip(timed, times, strict=True):
        if key_of(fields) not in bench.known:  # the bare GEMMs are timed again beside every peer
            ratio = round(result.median_ms / of_bare[fields["gemms"]], 4)
            bench.add("time", {**fields, **result.fields(), "of_bare": ratio})


def verified(bench: Bench, x: LinearInputs, cases: list[HeadCase]) -> list[HeadCase]:
    """The cases whose gradients agree with float64; the others become rows that say so."""
    exact = bench.guarded(head_fields(bench.plan, "float64", 0), lambda: oracle(x, rows=ORACLE_ROWS))
    if exact is None:
        return []
    right: list[HeadCase] = []
    for fields, run in cases:

        def error(run: Callable[[LinearInputs], Gradients] = run) -> float:
            return relative_error(run(x), exact)

        found = bench.guarded(fields, error)
        if found is not None and not found <= ERROR_BOUND[x.hidden.dtype]:
            kind = "left out" if fields.get("peer") else "failure"
            bench.add(kind, {**fields, "reason": f"wrong: relative error {found:.2e} of its gradients"})
        elif found is not None:
            right.append(({**fields, "max_error": found}, run))
    return right
