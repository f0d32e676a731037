"""token_stats against eager torch and torch.compile, our kernels in every variant, and views against copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.cases.case import OURS, Case
from benchmarks.cases.rows import BACKWARD, FORWARD, GRADIENT, INPLACE, STATISTICS, Oracle, RowInputs, oracle
from benchmarks.cases.rows_peers import COMPILED, EAGER
from benchmarks.harness import verify
from benchmarks.harness.clock import Clock, Timed
from benchmarks.harness.memory import peak_extra_mib
from benchmarks.harness.results import Row
from vcpo_kernels.core import registry

# A result that is not right is not timed. Ours: the package's own bounds. Eager torch in bf16 has no bound to keep.
ERROR_BOUND = {FORWARD: registry.BACKENDS["native"].relative_error, BACKWARD: 4e-3}

_ALL = (STATISTICS, GRADIENT, replace(INPLACE, name=f"{OURS}, in place", work=BACKWARD), *EAGER, *COMPILED)
CASES = tuple(case for work in (FORWARD, BACKWARD) for case in _ALL if case.work == work)


def run_cases(x: RowInputs, clock: Clock, peers: bool, progress: Progress) -> list[Row]:
    """Every case, our kernels in every variant."""
    want = oracle(x)
    source = x.logits.detach().contiguous()
    _, copy = clock.copy(source, source.clone())
    todo = [
        (case, suffix, isa)
        for case in CASES
        for suffix, isa in (variants(clock.device) if case.name == OURS else [("", "")])
        if peers or case.ours
    ]
    task = progress.add_task("timing", total=len(todo))
    rows: list[Row] = [{"name": "copy", "work": "copy", "gb_per_s": round(copy, 2), "floor_nv": 2}]
    for case, suffix, isa in todo:
        progress.update(task, description=f"{case.name}{suffix}, {case.work}")
        with instruction_set(isa):
            rows.append(measure(replace(case, name=case.name + suffix), isa, x, want, clock, copy))
        progress.advance(task)
    return rows


def measure(case: Case[RowInputs], isa: str, x: RowInputs, want: Oracle, clock: Clock, copy_gb_per_s: float) -> Row:
    """Verify, time and weigh one case. In place: timed on its own output, which is as good as any logits for that."""
    on = replace(x, logits=x.logits.clone()) if case.inplace else x
    error = case.error(case.run(on), want)
    if case.ours:
        verify.require(f"{case.name}, {case.work}", error, ERROR_BOUND[case.work])
    call = partial(case.run, on)
    times = clock.measure(call)
    gb_per_s = times.gb_per_s(case.floor_nv * x.logits.numel() * x.logits.element_size())
    return {
        "name": case.name,
        "work": case.work,
        "isa": isa,
        **times.fields(digits=3),
        "floor_nv": case.floor_nv,
        "gb_per_s": round(gb_per_s, 2),
        "fraction_of_copy": round(gb_per_s / copy_gb_per_s, 3),
        "peak_extra_mib": peak_extra_mib(clock.device, call),
        "max_error": error,
    }


def variants(device: torch.device) -> list[tuple[str, str]]:
    """(suffix, instruction set) of each variant of our kernels to time; the first is the default."""
    if device.type != "cpu":
        return [("", "")]
    from vcpo_kernels import _native

    chosen = _native.isa_chosen()
    others = [isa for isa in reversed(_native.isa_available()) if isa != chosen]
    return [("", chosen)] + [(f" ({isa})", isa) for isa in others]


@contextlib.contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Run our CPU kernels in one of their variants; "" leaves them as they are."""
    if not isa:
        yield
        return
    from vcpo_kernels import _native

    before = _native.isa_chosen()
    _native.isa_choose(isa)
    try:
        yield
    finally:
        _native.isa_choose(before)


def run_layouts(x: RowInputs, clock: Clock) -> list[Row]:
    """Non-contiguous views against contiguous copies of the same rows."""
    n, v = x.logits.shape
    views = {
        "all but the last token": (x.logits.view(4, n // 4, v)[:, :-1], x.token_ids.view(4, -1)[:, :-1]),
        "every second row": (x.logits[::2], x.token_ids[::2]),
    }
    rows = []
    for name, (view, ids) in views.items():
        calls = [partial(_forward, logits, ids) for logits in (view, view.contiguous())]
        times = clock.in_turn([Timed(call) for call in calls])
        for label, call, of_call in zip((name, f"{name}, contiguous"), calls, times, strict=True):
            fields = of_call.fields(digits=3)
            rows.append(
                {
                    "name": label,
                    "work": "layout",
                    "median_ms": fields["median_ms"],
                    "fastest_ms": fields["fastest_ms"],
                    "peak_extra_mib": peak_extra_mib(clock.device, call),
                    "repeats": fields["repeats"],
                }
            )
    return rows


@torch.no_grad()
def _forward(logits: Tensor, token_ids: Tensor) -> vk.TokenStats:
    return vk.token_stats(logits, token_ids)
