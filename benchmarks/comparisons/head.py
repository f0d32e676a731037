"""The fused head against its bare GEMMs and its peers, and weighted_logp on logits against token_stats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.cases import head, rows
from benchmarks.cases.case import Case
from benchmarks.cases.head import FAST, LEAN, BareGemms, HeadInputs
from benchmarks.cases.head_peers import PEERS
from benchmarks.comparisons.rows import ERROR_BOUND
from benchmarks.harness import verify
from benchmarks.harness.clock import Clock, Timed
from benchmarks.harness.memory import peak_extra_mib
from benchmarks.harness.results import Row

CASES = (*head.CASES, *PEERS)
GEMMS = (2, 3, 4)


def extra_mib(case: Case[HeadInputs], x: HeadInputs, device: torch.device) -> float | None:
    """Peak beyond inputs and gradients; with two GEMMs there is no gradient of the weight."""
    peak = peak_extra_mib(device, lambda: case.run(x))
    gradients = x.hidden.numel() + (0 if case.gemms == 2 else x.weight.numel())
    return None if peak is None else max(0.0, peak - gradients * x.hidden.element_size() / 2**20)


def measure(x: HeadInputs, cases: Sequence[Case[HeadInputs]], clock: Clock, progress: Progress) -> list[Row]:
    """Verify and weigh each case, then time all of them and the bare GEMMs in turn."""
    halved = head.half_masked(x)
    inputs = {case.name: halved if case.masked else x for case in cases}
    exact = {False: head.oracle(x), True: head.oracle(halved)}
    found: list[Row] = []
    task = progress.add_task("verifying", total=len(cases))
    for case in cases:
        progress.update(task, description=f"verifying {case.name}")
        error = case.error(case.run(inputs[case.name]), exact[case.masked])
        verify.require(case.name, error, head.ERROR_BOUND[x.hidden.dtype])
        extra = extra_mib(case, inputs[case.name], clock.device)
        found.append({"name": case.name, "bare": case.gemms, "max_error": error, "peak_extra_mib": extra})
        progress.advance(task)
    del exact
    gemms = BareGemms(x)
    calls = [partial(gemms.run, n) for n in GEMMS] + [partial(c.run, inputs[c.name]) for c in cases]
    progress.update(task, description=f"timing {len(calls)} calls", total=None)
    times = clock.in_turn([Timed(call) for call in calls])
    progress.remove_task(task)
    bare, of_cases = dict(zip(GEMMS, times, strict=False)), times[len(GEMMS) :]
    ours = min(t.median_ms for c, t in zip(cases, of_cases, strict=True) if c in (FAST, LEAN))
    for case, row, of_case in zip(cases, found, of_cases, strict=True):
        row |= of_case.fields(digits=2)
        row["of_bare"] = round(of_case.median_ms / bare[case.gemms].median_ms, 3)
        if not case.ours:
            row["times_slower"] = round(of_case.median_ms / ours, 2)
    return [{"name": BareGemms.name(n), "bare": n, **t.fields(digits=2)} for n, t in bare.items()] + found


def weighted_on_logits(clock: Clock, count: int, vocabulary: int, dtype: torch.dtype) -> list[Row]:
    """weighted_logp against token_stats, forward and backward, out of place and in place."""
    x = rows.make_inputs(count, vocabulary, dtype, clock.device)
    scratch = x.logits.clone()

    def gradient(inplace: bool, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = (scratch if inplace else x.logits).detach().requires_grad_()
        return torch.autograd.grad(loss_of(rows.computed(leaf)), leaf)[0]

    def two_passes(inplace: bool) -> Tensor:
        return gradient(inplace, lambda z: (vk.token_stats(z, x.token_ids, inplace_backward=inplace).logp * x.g).sum())

    def one_pass(inplace: bool) -> Tensor:
        return gradient(inplace, lambda z: vk.weighted_logp(z, x.token_ids, x.g, inplace=inplace)[0])

    calls = [partial(f, inplace) for inplace in (False, True) for f in (two_passes, one_pass)]
    names = [f"{f}{place}" for place in ("", ", in place") for f in ("token_stats", "weighted_logp")]
    exact = rows.oracle(x)
    errors = []
    for name, call in zip(names, calls, strict=True):
        scratch.copy_(x.logits)
        errors.append(rows.gradient_error(call(), exact))
        verify.require(f"{name} on logits", errors[-1], ERROR_BOUND[rows.BACKWARD])
    del exact
    times = clock.in_turn([Timed(call) for call in calls])
    base = (times[0], times[0], times[2], times[2])
    return [
        {
            "name": n,
            "work": "on logits",
            **t.fields(digits=2),
            "of_two_passes": round(t.median_ms / b.median_ms, 3),
            "max_error": e,
        }
        for n, t, b, e in zip(names, times, base, errors, strict=True)
    ]
