"""Numbers that change from call to call under torch.compile: every call's own value, in one graph.

A number is a constant of the first graph and an input of the second, which serves every later value: two graphs for any
number of values, one with dynamic=True.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import vcpo_kernels as vk
from vcpo_kernels import objectives

pytestmark = pytest.mark.cpu_only("graphs are the same on every device")

B, T, V, H = 4, 5, 17, 8
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(B, T, V, generator=GENERATOR)
HIDDEN, WEIGHT = torch.randn(B, T, H, generator=GENERATOR), torch.randn(V, H, generator=GENERATOR)
IDS = torch.randint(0, V, (B, T), generator=GENERATOR)
MASK = torch.arange(T) < torch.tensor([[5], [3], [4], [2]])
LOGP = torch.log_softmax(LOGITS, -1).gather(-1, IDS[..., None])[..., 0]
MU, PROXIMAL, REFERENCE = (LOGP + 0.5 * torch.randn(B, T, generator=GENERATOR) for _ in range(3))
ADVANTAGES = torch.tensor([1.0, -0.5, -2.0, 0.75])
COEFFICIENTS = torch.randn(B, T, generator=GENERATOR)

Function = Callable[[Tensor, Any], Tensor]  # (logits or hidden states, number) -> loss
FALLING = (1.3, 1.1, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4)
COUNTS = (24.0, 23.0, 30.0, 17.0, 11.0, 8.5, 40.0, 26.0, 5.0, 7.0)


def loss_of(stats: vk.TokenStats) -> Tensor:
    return (COEFFICIENTS * stats.logp).sum() + stats.entropy.sum()


def rewarded(x: Tensor, **config: Any) -> Tensor:
    segments = vk.Segments.padded(MASK)
    out = vk.vcpo_loss(vk.token_stats(x, IDS), MU, ADVANTAGES, 2, segments, vk.VCPOConfig(**config))
    return out.loss + out.ess_ratio


def method(name: str, x: Tensor, **keywords: Any) -> Tensor:
    segments = vk.Segments.padded(MASK)
    out = getattr(objectives, name)(vk.token_stats(x, IDS), MU, ADVANTAGES, segments, **keywords)
    return out.loss + out.ess_ratio + sum(out.metrics.values())


def advantages(x: Tensor, k: float) -> Tensor:
    a = objectives.group_normalized_advantages(ADVANTAGES + x.detach().mean(), 2, epsilon=k)
    return (x.sum((1, 2)) * a).sum()


def rows_cases() -> Iterator[tuple[str, Function, tuple[Any, ...]]]:
    head = {"hidden": HIDDEN, "weight": WEIGHT}
    del head
    yield "token_stats", lambda x, k: loss_of(vk.token_stats(x, IDS, temperature=k)), FALLING
    yield "temperature used elsewhere", lambda x, k: loss_of(vk.token_stats(x * k, IDS, temperature=k + 0.1)) * k, FALLING
    yield "softcap", lambda x, k: loss_of(vk.token_stats(x, IDS, temperature=0.9, softcap=k)), FALLING
    yield "weighted_logp", lambda x, k: vk.weighted_logp(x, IDS, COEFFICIENTS, temperature=k)[0], FALLING
    yield "weighted_logp softcap", lambda x, k: vk.weighted_logp(x, IDS, COEFFICIENTS, softcap=k)[0], FALLING


def head_cases() -> Iterator[tuple[str, Function, tuple[Any, ...]]]:
    yield "linear_token_stats", lambda h, k: loss_of(vk.linear_token_stats(h, WEIGHT, IDS, temperature=k)), FALLING
    yield (
        "linear_token_stats lean",
        lambda h, k: loss_of(vk.linear_token_stats(h, WEIGHT, IDS, temperature=k, softcap=k + 1, memory="lean")),
        FALLING,
    )
    yield (
        "linear_weighted_logp",
        lambda h, k: vk.linear_weighted_logp(h, WEIGHT, IDS, COEFFICIENTS, temperature=k, softcap=2 * k)[0],
        FALLING,
    )


def sequence_cases() -> Iterator[tuple[str, Function, tuple[Any, ...]]]:
    for name in ("max_weight", "ess_max_weight"):
        yield f"vcpo {name}", lambda x, k, n=name: rewarded(x, **{n: k}), FALLING
    for name in ("num_tokens", "num_sequences", "max_tokens"):
        aggregation = {"num_tokens": "token-mean", "max_tokens": "seq-mean-token-sum-norm"}.get(name, "seq-mean-token-mean")
        for kind in (float, int, np.float64, np.int64):
            yield (
                f"vcpo {name} {kind.__name__}",
                lambda x, k, n=name, a=aggregation: rewarded(x, **{n: k * 2, "aggregation": a}),
                tuple(kind(k) for k in COUNTS),
            )
    yield "epsilon", advantages, FALLING


def objective_cases() -> Iterator[tuple[str, Function, tuple[Any, ...]]]:
    for name in objectives.__all__:
        kind = getattr(objectives, name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and issubclass(kind, objectives.TokenObjective)):
            continue
        if kind is objectives.TokenObjective:
            continue
        value = kind()
        for field in dataclasses.fields(kind):
            default = getattr(value, field.name)
            if isinstance(default, tuple):
                numbers: tuple[Any, ...] = tuple((0.1 * k, 2 * k) for k in FALLING)
            elif "float" in str(field.type):
                numbers = FALLING
                if field.name == "dual_clip":
                    numbers = tuple(k + 2 for k in FALLING)
                if field.name.startswith("min"):
                    numbers = tuple(k / 3 for k in FALLING)
                if field.name.startswith("max"):
                    numbers = tuple(k + 0.7 for k in FALLING)
            else:
                continue
            yield f"{kind.name} {field.name}", lambda x, k, m=kind.name, n=field.name: method(m, x, **{n: k}), numbers


def term_cases() -> Iterator[tuple[str, Function, tuple[Any, ...]]]:
    for name in ("ppo_clip", "vespo"):
        for term in ("num_sequences", "num_tokens", "max_tokens", "kl_coefficient", "entropy_coefficient", "ess_max_weight"):
            extra = {
                "num_tokens": {"aggregation": "token-mean"},
                "max_tokens": {"aggregation": "seq-mean-token-sum-norm"},
                "kl_coefficient": {"reference_logp": REFERENCE},
            }.get(term, {})
            numbers = COUNTS if term.startswith(("num", "max")) else FALLING
            yield f"{name} {term}", lambda x, k, m=name, n=term, e=extra: method(m, x, **{n: k}, **e), numbers
    for mode in ("truncate", "mask"):
        yield (
            f"correction {mode}",
            lambda x, k, mode=mode: method(
                "ppo_clip", x, proximal_logp=PROXIMAL, correction=objectives.Correction(mode, minimum=k / 3, maximum=k)
            ),
            FALLING,
        )


CASES = {name: (f, ks) for cases in (rows_cases, head_cases, sequence_cases, objective_cases, term_cases) for name, f, ks in cases()}


def run(function: Function, numbers: tuple[Any, ...], backend: str = "aot_eager", dynamic: bool | None = None, fullgraph: bool = True) -> int:
    """How many graphs were compiled; every call's value and gradient are eager's."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=fullgraph, dynamic=dynamic)
    data = HIDDEN if "linear" in str(function) else LOGITS
    for k in numbers:
        results = []
        for f in (function, compiled):
            x = data.clone().requires_grad_()
            value = f(x, k)
            results.append((value.detach(), torch.autograd.grad(value, x)[0]))
        torch.testing.assert_close(results[1], results[0], msg=lambda m, k=k: f"{k}: {m}")
    return counter.frame_count
