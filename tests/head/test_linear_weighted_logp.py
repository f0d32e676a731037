"""linear_weighted_logp against whole logits in float64, and the two phases of VCPO against one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.head.head_inputs import FIELDS, HeadInputs, distance, make, through_logits
from vcpo_kernels.head import linear_weighted_logp, score_matrix

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
SWITCHES = list(itertools.product((False, True), repeat=3))


def through_head(x: HeadInputs, upstream: float = 1.0, **options: object) -> tuple[Tensor, vk.TokenStats, list[Tensor]]:
    """loss, statistics and gradients of hidden, weight, (bias,) coefficients."""
    leaves, c = x.leaves(), x.g.clone().requires_grad_()
    bias = leaves[2] if x.bias is not None else None
    loss, stats = vk.linear_weighted_logp(leaves[0], leaves[1], x.token_ids, c, bias, x.mask, **options)
    return loss.detach(), stats, list(torch.autograd.grad(loss * upstream, [*leaves, c]))


@pytest.mark.parametrize("chunk_bytes", (1 << 28, 5000, 1))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("bias", "masked", "shift"), SWITCHES)
def test_equals_whole_logits(bias: bool, masked: bool, shift: bool, dtype: torch.dtype, chunk_bytes: int) -> None:
    x = make(dtype, bias=bias, masked=masked)
    options = {"temperature": 0.9, "softcap": 6.0 if masked else None, "shift": shift}
    want, grads = through_logits(x, **options)
    eager = [distance(a, b) for a, b in zip(through_logits(x, dtype, **options)[1], grads, strict=True)]
    bound = max(TOLERANCE[dtype], 2 * max(eager))
    loss, stats, got = through_head(x, chunk_bytes=chunk_bytes, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(float(loss) - float((want.logp * x.g).sum())) <= bound * float((want.logp * x.g).abs().sum())
    for field in FIELDS:
        assert distance(getattr(stats, field), getattr(want, field)) <= bound, field
        assert not getattr(stats, field).requires_grad
    for a, b in zip(got[:-1], grads, strict=True):
        assert a.dtype == dtype
        assert distance(a, b) <= bound
    assert distance(got[-1], want.logp) <= max(bound, 1e-7)


@pytest.mark.parametrize("chunk_bytes", (1 << 28, 5000))
def test_every_backend(implementation: str, chunk_bytes: int) -> None:
    x = make(torch.float32, bias=True, masked=True)
    want, grads = through_logits(x)
    _, stats, got = through_head(x, chunk_bytes=chunk_bytes)
    assert distance(stats.score_sqnorm, want.score_sqnorm) <= 2e-6
    for a, b in zip(got, [*grads, want.logp], strict=True):
        assert distance(a, b) <= 2e-6


@pytest.mark.parametrize("upstream", (-0.25, 0.0, 3.0))
def test_any_upstream_gradient(upstream: float) -> None:
    x = make(torch.float32, masked=True, bias=True)
    want, grads = through_logits(replace(x, g=x.g * upstream))
    _, _, got = through_head(x, upstream)
    for a, b in zip(got, [*grads, want.logp * upstream], strict=True):
        assert distance(a, b) <= 2e-6


def test_a_factor_of_one_multiplies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[Tensor] = []
    monkeypatch.setattr(Tensor, "mul_", lambda self, other: multiplied.append(self))
    hidden, weight = make().leaves()
    loss, _ = vk.linear_weighted_logp(hidden, weight, make().token_ids, make().g)
    loss.backward()
    assert not multiplied


def test_retained_graph() -> None:
    x = make(torch.float32, masked=True)
    leaves = x.leaves()
    loss, _ = vk.linear_weighted_logp(*leaves, x.token_ids, x.g, mask=x.mask)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_gemms_see_only_rows_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked rows in no GEMM; rows with a coefficient of 0 in the first alone."""
    scored: list[int] = []
    plain: list[int] = []
    score_, statistics_of = score_matrix.score_, linear_weighted_logp.statistics_of
    monkeypatch.setattr(score_matrix, "score_", lambda h, *a: (scored.append(h.rows), score_(h, *a))[1])
    monkeypatch.setattr(
        linear_weighted_logp, "statistics_of", lambda h, *a: (plain.append(h.rows), statistics_of(h, *a))[1]
    )
    x = make(torch.float32, (20,))
    x = replace(x, mask=torch.arange(20) % 2 == 0, g=torch.where(torch.arange(20) < 8, 1.0, 0.0))
    _, stats, got = through_head(x)
    assert (plain, scored) == ([6], [4])
    want, grads = through_logits(x)
    assert distance(stats.entropy, want.entropy) <= 2e-6
    for a, b in zip(got, grads, strict=False):
        assert distance(a, b) <= 2e-6


@pytest.mark.parametrize("only", (0, 1, 2, None))
def test_one_gradient_alone(only: int | None) -> None:
    x = make(torch.float32, bias=True, masked=True)
    operands = [t.clone() for t in (x.hidden, x.weight, x.bias)]
    if only is not None:
        operands[only].requires_grad_()
    hidden, weight, bias = operands
    loss, stats = vk.linear_weighted_logp(hidden, weight, x.token_ids, x.g, bias, x.mask, chunk_bytes=9000)
    want, grads = through_logits(x)
    assert distance(stats.logp, want.logp) <= 2e-6
    assert loss.requires_grad == (only is not None)
    if only is not None:
        loss.backward()
        assert distance(operands[only].grad, grads[only]) <= 2e-6


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3, 1), (4,)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x = make(torch.float32, shape, bias=True)
    x = replace(x, mask=torch.zeros(shape, dtype=torch.bool) if shape == (4,) else None)
    loss, _, grads = through_head(x, shift=shape == (3, 1))
    assert loss == 0
    assert all(bool((g == 0).all()) for g in grads[:-1])


def test_all_coefficients_zero() -> None:
    """Zero advantages everywhere: exactly zero gradients from one GEMM, statistics as ever."""
    x = make(torch.float32, bias=True)
    _, stats, grads = through_head(replace(x, g=torch.zeros_like(x.g)))
    assert distance(stats.logp, through_logits(x)[0].logp) <= 2e-6
    assert all(bool((g == 0).all()) for g in grads[:-1])


def test_masked_rows_and_minus_infinity_come_to_nothing() -> None:
    """NaN rows outside the mask; inside it a token that cannot be emitted, with a coefficient of 0."""
    x = make(torch.float32, (12,), bias=True)
    mask = torch.arange(12) % 3 != 0
    hidden, bias, c = x.hidden.clone(), x.bias.clone(), torch.where(mask, x.g, math.nan)
    hidden[~mask] = math.nan
    bias[int(x.token_ids[1])] = -math.inf
    c[x.token_ids == x.token_ids[1]] = 0
    hidden.requires_grad_()
    loss, stats = vk.linear_weighted_logp(hidden, x.weight, x.token_ids, c, bias, mask)
    loss.backward()
    assert stats.logp[1] == -math.inf
    assert math.isfinite(loss.item())
    assert bool(hidden.grad.isfinite().all())


@pytest.mark.cpu_only("enters the CPU's autocast")
def test_autocast_and_mixed_dtypes() -> None:
    x = make(torch.float32)
    cast = replace(x, hidden=x.hidden.bfloat16(), weight=x.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        _, stats, grads = through_head(x)
    _, want, want_grads = through_head(cast)
    assert torch.equal(stats.logp, want.logp)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    for a, b in zip(grads, want_grads, strict=True):
        assert torch.equal(a, b.float())


# --- two phases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_logits", (False, True))
@pytest.mark.parametrize("weighting", ("paper", "estimator", "official"))
def test_two_phases_over_split_groups_equal_one(weighting: str, on_logits: bool) -> None:
    """Statistics of the window first; then micro-batches that scatter the groups. What TRL's shuffling does."""
    batch, length = 12, 7
    x = make(torch.float64, (batch, length), masked=True)
    segments, groups = vk.Segments.padded(x.mask), torch.arange(batch) % 3
    mu = -6 * torch.rand(batch, length, dtype=torch.float64)
    rewards = torch.randn(batch, dtype=torch.float64)
    config = vk.VCPOConfig(baseline_weighting=weighting)

    leaves = x.leaves()
    stats = vk.linear_token_stats(*leaves, x.token_ids, mask=x.mask, shift=True)
    whole = vk.vcpo_loss(stats, mu, rewards, groups, segments, config, num_groups=3)
    want = torch.autograd.grad(whole.loss, leaves)

    hidden, weight = x.leaves()
    with torch.no_grad():
        stats = vk.linear_token_stats(hidden, weight, x.token_ids, mask=x.mask, shift=True)
        out = vk.vcpo_loss(stats, mu, rewards, groups, segments, config, num_groups=3)
        c = segments.spread(-out.coefficients)
    for rows in torch.randperm(batch).split(5):
        part = (x.token_ids[rows], c[rows])
        if on_logits:
            loss, _ = vk.weighted_logp(hidden[rows] @ weight.T, *part, x.mask[rows], shift=True, inplace=True)
        else:
            loss, _ = vk.linear_weighted_logp(hidden[rows], weight, *part, mask=x.mask[rows], shift=True)
        loss.backward()
    torch.testing.assert_close(out.loss, whole.loss.detach())
    assert distance(hidden.grad, want[0]) <= 1e-13
    assert distance(weight.grad, want[1]) <= 1e-13


# --- as a torch op ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", (1 << 20, 100))
def test_gradcheck(chunk_bytes: int) -> None:
    x = make(torch.float64, (2, 4), 3, 7, bias=True, masked=True)
    c = x.g.double().requires_grad_()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, c: Tensor) -> Tensor:
        settings = {"temperature": 1.3, "softcap": 2.0, "shift": True, "chunk_bytes": chunk_bytes}
        return vk.linear_weighted_logp(hidden, weight, x.token_ids, c, bias, x.mask, **settings)[0]

    assert torch.autograd.gradcheck(loss, (*x.leaves(), c))


@pytest.mark.cpu_only("schemas and fakes are the same on every device")
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("shift", (False, True))
def test_opcheck(shift: bool, masked: bool) -> None:
    x = make(torch.float32, (2, 5), 4, 11, bias=True, masked=masked)
    hidden, weight, bias = x.leaves()
    arguments = (hidden, weight, bias, x.token_ids, x.mask, x.g, 0.9, None, shift, 200, True, True, True)
    torch.library.opcheck(torch.ops.vcpo_kernels.linear_weighted_logp.default, arguments)


@pytest.mark.cpu_only("graphs are the same on every device")
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiles_without_a_graph_break(backend: str) -> None:
    x = make(torch.float32, masked=True)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return -0.5 * vk.linear_weighted_logp(hidden * 1.5, weight, x.token_ids, x.g, mask=x.mask, shift=True)[0]

    leaves = x.leaves()
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"coefficients": torch.ones(2)}, ValueError, r"coefficients must have shape \(2, 3\).*segments.spread"),
        ({"coefficients": 1.0}, TypeError, "linear_weighted_logp: coefficients must be a torch.Tensor"),
        ({"weight": torch.zeros(4, 7)}, ValueError, r"linear_weighted_logp: weight must be \[V, 4\]"),
        ({"token_ids": torch.full((2, 3), 7)}, ValueError, r"linear_weighted_logp: token_ids must lie in \[0, 7\)"),
        ({"chunk_bytes": "1G"}, TypeError, "chunk_bytes must be an int >= 1"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    valid = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(7, 4),
        "token_ids": torch.zeros(2, 3).long(),
        "coefficients": torch.ones(2, 3),
    }
    with pytest.raises(error, match=message):
        vk.linear_weighted_logp(**{**valid, **arguments})  # type: ignore[arg-type]
