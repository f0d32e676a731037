"""Numbers that change from call to call under torch.compile: every call's own value, in one graph.

A number is a constant of the first graph and an input of the second, which serves every later value: two graphs for any
count of values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


LOGITS, HIDDEN, WEIGHT, COEFFICIENTS = 2 * randn(B, T, V), randn(B, T, H), randn(V, H), randn(B, T)
IDS = torch.randint(0, V, (B, T), generator=GENERATOR)
MASK = torch.arange(T) < torch.tensor([[5], [3], [4], [2]])
LOGP = torch.log_softmax(LOGITS, -1).gather(-1, IDS[..., None])[..., 0]
MU, PROXIMAL, REFERENCE = (LOGP + 0.5 * randn(B, T) for _ in range(3))
ADVANTAGES = torch.tensor([1.0, -0.5, -2.0, 0.75])
# Older torch compiles objectives anew for a value, some functions of numbers being none that it keeps in a graph there.
ANEW = torch.__version__ < "2.13"
NUMBERS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4)

Function = Callable[[Tensor, Any], Tensor]  # (what the gradient is of, number) -> loss


def loss_of(stats: vk.TokenStats) -> Tensor:
    return (COEFFICIENTS * stats.logp).sum() + stats.entropy.sum()


def everything(out: Any) -> Tensor:
    """One number that all of an output went into."""
    total: Tensor = out.loss + out.ess_ratio + sum(out.metrics.values())
    return total


def vcpo(logp: Tensor, k: Any, aggregation: str = "token-mean") -> Tensor:
    config = vk.VCPOConfig(
        max_weight=k, ess_max_weight=k, num_tokens=k, num_sequences=k, max_tokens=k, aggregation=aggregation
    )  # fmt: skip
    stats = vk.TokenStats(logp, logp.square(), torch.ones_like(logp), torch.zeros_like(logp))
    return everything(vk.vcpo_loss(stats, MU, ADVANTAGES, 2, vk.Segments.padded(MASK), config))


def normalized(rewards: Tensor, k: float) -> Tensor:
    return (rewards * objectives.group_normalized_advantages(rewards.detach(), 2, epsilon=k)).sum()


FUNCTIONS: dict[str, tuple[Function, Tensor]] = {
    "token_stats": (lambda x, k: loss_of(vk.token_stats(x, IDS, MASK, temperature=k)), LOGITS),
    "numbers made of it, and used elsewhere": (
        lambda x, k: loss_of(vk.token_stats(x * k, IDS, temperature=k + 0.1, softcap=2 / k)) * k,
        LOGITS,
    ),
    "default temperature": (lambda x, k: loss_of(vk.token_stats(x * k, IDS)), LOGITS),
    "weighted_logp": (
        lambda x, k: vk.weighted_logp(x, IDS, COEFFICIENTS, temperature=k, softcap=5 * k)[0],
        LOGITS,
    ),
    "linear_token_stats": (lambda h, k: loss_of(vk.linear_token_stats(h, WEIGHT, IDS, temperature=k)), HIDDEN),
    "linear_token_stats, lean": (
        lambda h, k: loss_of(vk.linear_token_stats(h, WEIGHT, IDS, temperature=k, softcap=5 * k, memory="lean")),
        HIDDEN,
    ),
    "linear_weighted_logp": (
        lambda h, k: vk.linear_weighted_logp(h, WEIGHT, IDS, COEFFICIENTS, temperature=k, softcap=5 * k)[0],
        HIDDEN,
    ),
    "vcpo_loss": (vcpo, LOGP),
    "vcpo_loss, by the longest": (lambda x, k: vcpo(x, k, "seq-mean-token-sum-norm"), LOGP),
    "advantages": (normalized, ADVANTAGES),
}


def hyperparameters(kind: type[objectives.TokenObjective], k: float) -> dict[str, Any]:
    """Of an objective, all that are numbers, made of one."""
    value: Any = kind()
    numbers: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        if isinstance(getattr(value, field.name), tuple):
            numbers[field.name] = (k / 3, k + 0.2)
        elif "float" in str(field.type):
            above = {"max": 0.5, "dua": 2.0}.get(field.name[:3], 0.0)  # above what the others are
            numbers[field.name] = k / 3 if field.name.startswith("min") else k + above
    return numbers


def terms(k: float) -> dict[str, Any]:
    return {
        "num_sequences": 5 * k, "num_tokens": 20 * k, "max_tokens": 9 * k, "kl_coefficient": k, "reference_logp": REFERENCE,
        "entropy_coefficient": k, "ess_max_weight": k + 1,
    }  # fmt: skip


METHODS = {
    kind.name: kind
    for kind in vars(objectives).values()
    if isinstance(kind, type) and issubclass(kind, objectives.TokenObjective) and kind is not objectives.TokenObjective
}


def objective(name: str) -> Function:
    kind = METHODS[name]

    def loss(logp: Tensor, k: float) -> Tensor:
        stats = vk.TokenStats(logp, logp.square(), torch.ones_like(logp), torch.zeros_like(logp))
        common = terms(k)
        if kind.proximal_terms == objectives.PPOClip.proximal_terms:
            correction = objectives.Correction("truncate", minimum=k / 3, maximum=k)
            common.update({"proximal_logp": PROXIMAL, "correction": correction})
        segments = vk.Segments.padded(MASK)
        called = getattr(objectives, name)(
            stats, MU, ADVANTAGES, segments, aggregation="token-mean", **hyperparameters(kind, k), **common
        )
        return everything(called) + everything(
            kind(aggregation="seq-mean-token-sum-norm")(stats, MU, ADVANTAGES, segments, max_tokens=9 * k)
        )

    return loss


def graphs(function: Function, at: Tensor, numbers: tuple[Any, ...], backend: str = "aot_eager", **how: Any) -> int:
    """How many were compiled; each call's value and gradient are eager's."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, **{"fullgraph": True, **how})
    for k in numbers:
        results = []
        for f in (function, compiled):
            x = at.clone().requires_grad_()
            value = f(x, k)
            results.append((value.detach(), torch.autograd.grad(value, x)[0]))
        torch.testing.assert_close(results[1], results[0], msg=lambda m, k=k: f"{k}: {m}")
    count: int = counter.frame_count
    return count


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    """Ten temperatures, caps, truncations and counts, forward and backward, in two graphs without a break."""
    assert graphs(*FUNCTIONS[name], NUMBERS) == 2


# One of each family of rules in every run; the others, which compile the same helpers, with the slow tests.
FAMILIES = {"ppo_clip", "gspo", "icepop", "vespo", "topr", "m2po"}
EVERY_METHOD = [m if m in FAMILIES else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_objectives(name: str) -> None:
    """All hyperparameters of every objective and all terms of a call."""
    assert graphs(objective(name), LOGP, NUMBERS[:3] if ANEW else NUMBERS) == 2 or ANEW


@pytest.mark.parametrize("name", ["token_stats", "default temperature", "linear_token_stats", "vcpo_loss"])
def test_dynamic(name: str) -> None:
    """dynamic=True: sizes and numbers are inputs; the default temperature, a constant of ours, must not break the graph."""
    assert graphs(*FUNCTIONS[name], NUMBERS, dynamic=True) <= 2


def test_dynamic_objective() -> None:
    assert graphs(objective("ppo_clip"), LOGP, NUMBERS[:3] if ANEW else NUMBERS, dynamic=True) <= 2 or ANEW


@pytest.mark.parametrize("cached", [False, True])
def test_compiled_code_is_not_another_numbers(cached: bool) -> None:
    """Inductor's graphs in AOTAutogradCache are told apart by code, in which a number that was taken by value does not show."""
    with torch._functorch.config.patch(enable_autograd_cache=cached):
        for name in ("numbers made of it, and used elsewhere", "vcpo_loss")[: 1 + cached]:
            assert graphs(*FUNCTIONS[name], NUMBERS, "inductor") == 2
            # A second function of the same code, as another process finds the first's in the cache on disk.
            assert graphs(*FUNCTIONS[name], NUMBERS[3:], "inductor") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_clip", "vespo", "topr"])
def test_objectives_in_inductor(name: str) -> None:
    assert graphs(objective(name), LOGP, NUMBERS, "inductor") == 2


def test_counts_as_integers() -> None:
    """A count of tokens is an int in every trainer, and changes with every step."""
    counts = (24, 23, 30, 17, 11, 8, 40, 26, 5, 7)

    def loss(logp: Tensor, n: int) -> Tensor:
        stats = vk.TokenStats(logp, logp.square(), torch.ones_like(logp), torch.zeros_like(logp))
        segments = vk.Segments.padded(MASK)
        config = vk.VCPOConfig(aggregation="token-mean", num_tokens=n * 2, num_sequences=n)
        by_tokens = objectives.ppo_clip(stats, MU, ADVANTAGES, segments, aggregation="token-mean", num_tokens=n)
        return vk.vcpo_loss(stats, MU, ADVANTAGES, 2, segments, config).loss + by_tokens.loss

    assert graphs(loss, LOGP, counts) == 2


def test_values_of_a_config() -> None:
    """Made outside of what is compiled, a new one each step."""

    def loss(logp: Tensor, made: Any) -> Tensor:
        stats = vk.TokenStats(logp, logp.square(), torch.ones_like(logp), torch.zeros_like(logp))
        config, method = made
        segments = vk.Segments.padded(MASK)
        out = vk.vcpo_loss(stats, MU, ADVANTAGES, 2, segments, config)
        return out.loss + method(stats, MU, ADVANTAGES, segments).loss

    made = [(vk.VCPOConfig(max_weight=k + 1), objectives.PPOClip(clip_low=k / 2, clip_high=k)) for k in NUMBERS]
    assert graphs(loss, LOGP, tuple(made[:3] if ANEW else made)) == 2 or ANEW


@pytest.mark.skipif(ANEW, reason="torch says it there, before us")
def test_a_number_of_numpys_is_refused() -> None:
    """torch.compile makes a tensor of it, which nothing may read there; outside one graph it is read."""
    function, at = FUNCTIONS["token_stats"]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"temperature must be a float > 0, got a numpy number"):
        graphs(function, at, (np.float64(0.7),))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"epsilon must be a number, got a numpy number"):
        graphs(*FUNCTIONS["advantages"], (np.float64(0.7),))
    graphs(function, at, (np.float64(0.7), np.float64(0.6)), fullgraph=False)


def test_numbers_that_cannot_be_are_refused_in_a_graph() -> None:
    function, at = FUNCTIONS["token_stats"]
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=r"temperature must be finite and > 0"):
            graphs(function, at, (0.5, 0.6, bad))


@pytest.mark.parametrize("name", ["token_stats", "weighted_logp", "linear_token_stats", "linear_weighted_logp"])
def test_overloads_are_ops(name: str) -> None:
    """What torch wants of an op holds for the overloads that take numbers as tensors."""
    k, cap = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 5.0))
    at = (HIDDEN if name.startswith("linear") else LOGITS).clone().requires_grad_()
    rest: dict[str, tuple[Any, ...]] = {
        "token_stats": (IDS, MASK, k, cap, False, False),
        "weighted_logp": (IDS, MASK, COEFFICIENTS, k, None, False, True),
        "linear_token_stats": (WEIGHT, None, IDS, MASK, k, cap, False, "lean", 1 << 20, None, True, False, False),
        "linear_weighted_logp": (WEIGHT, None, IDS, MASK, COEFFICIENTS, k, cap, False, 1 << 20, True, False, False),
    }
    # Of weighted_logp's outputs the gradient is scaled in place by the backward, which a comparison after it takes amiss.
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.vcpo_kernels, name).Tensor, (at, *rest[name]), test_utils=utils)
