"""token_stats against the float64 reference on every backend that runs here, and its behaviour as a torch op.

The triton backend runs the same grid under its interpreter in tests/backends/triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vcpo_kernels as vk
from tests import row_inputs
from vcpo_kernels.backends import registry

FIELDS = ("logp", "entropy", "score_sqnorm", "lse")
IMPLEMENTATIONS = ("reference", "native:baseline", "native:avx2", "native:avx512")
OUTPUT_EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs on a CPU, the native one in each instruction set that this machine has."""
    name, _, isa = request.param.partition(":")
    if isa:
        native = request.getfixturevalue("native")
        if isa not in native.isa_available():
            pytest.skip(f"this CPU has no {isa}")
        native.isa_choose(isa)
    with vk.use_backend(name):
        yield name


def oracle(logits: Tensor, ids: Tensor, g: Tensor, h: Tensor, **options: object) -> tuple[vk.TokenStats, Tensor]:
    """Statistics and gradient of g . logp + h . entropy in float64, by the reference backend."""
    z = logits.double().requires_grad_()
    with vk.use_backend("reference"):
        stats = vk.token_stats(z, ids, **options)
        (torch.dot(stats.logp.flatten(), g.double()) + torch.dot(stats.entropy.flatten(), h.double())).backward()
    assert z.grad is not None
    return stats, z.grad


def assert_statistics(got: vk.TokenStats, want: vk.TokenStats, bound: float = 2e-6) -> None:
    """Relative error <= bound (1 + |value|) for all four; score_sqnorm also <= 1e-3 of itself (design, sections 2 and 7)."""
    for field in FIELDS:
        a, b = getattr(got, field), getattr(want, field)
        assert a.dtype == torch.float32
        error = (a.double() - b).abs() / (1 + b.abs())
        assert bool((error <= bound).all()), f"{field}: {error.max():.2e} at {int(error.argmax())}"
    error = (got.score_sqnorm.double() - want.score_sqnorm).abs()
    assert bool((error <= 1e-3 * want.score_sqnorm + 1e-30).all()), f"score_sqnorm: relative {error.max():.2e}"


def assert_gradient(got: Tensor, want: Tensor, scale: Tensor, stats: vk.TokenStats) -> None:
    """Within one rounding of the output dtype, plus what the statistics' own rounding to fp32 must carry over.

    scale [rows]: the size of the row's coefficients. p comes from the saved lse or logp, whichever is the smaller, so that
    half an ulp of that is a relative error of p.
    """
    assert got.shape == want.shape
    error = (got.double() - want).abs()
    saved = torch.minimum(stats.lse.abs(), stats.logp.abs()).double() * 2.0**-24
    bound = OUTPUT_EPS[got.dtype] * want.abs() + ((2e-6 + saved) * scale).unsqueeze(-1)
    if got.dtype == torch.float16:
        bound = bound + 2.0**-25  # half the spacing of its subnormals
    worst = (error / bound).max() if error.numel() else 0
    assert bool((error <= bound).all()), f"gradient: {worst:.2f} times the bound"


def run(logits: Tensor, ids: Tensor, g: Tensor, h: Tensor | None, **options: object) -> tuple[vk.TokenStats, Tensor]:
    z = logits.detach().requires_grad_()
    stats = vk.token_stats(z, ids, **options)
    loss = torch.dot(stats.logp.flatten(), g)
    if h is not None:
        loss = loss + torch.dot(stats.entropy.flatten(), h)
    (grad,) = torch.autograd.grad(loss, z)
    return stats, grad


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", row_inputs.VOCABULARIES)
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("kind", row_inputs.KINDS)
def test_matches_float64(implementation: str, kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    rows = 5
    logits, ids = row_inputs.make(kind, rows, vocabulary, dtype)
    g, h = torch.randn(rows), torch.randn(rows)
    stats, grad = run(logits, ids, g, h, temperature=0.9)
    want, want_grad = oracle(logits, ids, g, h, temperature=0.9)
    assert_statistics(stats, want)
    assert_gradient(grad, want_grad, g.abs() + h.abs() * (1 + want.entropy), want)


@pytest.mark.parametrize("vocabulary", (7, 4097))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("kind", row_inputs.KINDS)
def test_softcap_matches_float64(implementation: str, kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    """tanh in fp32: exact near 0, and flat (no gradient, no NaN) at logits of +-1e4."""
    logits, ids = row_inputs.make(kind, 5, vocabulary, dtype)
    g, h = torch.randn(5), torch.randn(5)
    stats, grad = run(logits, ids, g, h, softcap=30.0)
    want, want_grad = oracle(logits, ids, g, h, softcap=30.0)
    assert_statistics(stats, want)
    assert_gradient(grad, want_grad, g.abs() + h.abs() * (1 + want.entropy), want)


@pytest.mark.parametrize("temperature", (1e-2, 0.6, 1.0, 50.0))
def test_temperature_divides_the_logits(implementation: str, temperature: float) -> None:
    logits, ids = row_inputs.make("normal", 6, 1000, torch.float32)
    g = torch.randn(6)
    stats, grad = run(logits, ids, g, None, temperature=temperature)
    want, want_grad = oracle(logits, ids, g, torch.zeros(6), temperature=temperature)
    assert_statistics(stats, want)
    assert_gradient(grad, want_grad, g.abs() / temperature, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_full_vocabulary(implementation: str, dtype: torch.dtype) -> None:
    """A real vocabulary, large enough for streaming stores (8 MiB and more)."""
    logits, ids = row_inputs.make("normal", 32, 151936, dtype)
    g, h = torch.randn(32), torch.randn(32)
    stats, grad = run(logits, ids, g, h)
    want, want_grad = oracle(logits, ids, g, h)
    assert_statistics(stats, want)
    assert_gradient(grad, want_grad, g.abs() + h.abs() * (1 + want.entropy), want)


@pytest.mark.parametrize("vocabulary", (50257, 65536))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_streamed_gradient(native: object, dtype: torch.dtype, vocabulary: int) -> None:
    """Gradients of 8 MiB and more are written around the cache; odd rows then start and end inside a cache line."""
    rows = 88
    logits, ids = row_inputs.make("normal", rows, vocabulary, dtype)
    ids[:4] = torch.tensor([0, 1, vocabulary - 1, vocabulary // 2])  # targets in a row's head, tail and body
    g = torch.randn(rows)
    with vk.use_backend("native"):
        _, streamed = run(logits, ids, g, None)
        one_by_one = torch.cat([run(logits[i : i + 1], ids[i : i + 1], g[i : i + 1], None)[1] for i in range(rows)])
    assert torch.equal(streamed, one_by_one)


def test_score_sqnorm_has_no_cancellation(implementation: str) -> None:
    """(1 - p)^2 + sum of squares to 1e-3 of itself down to p_y = 1 - 1e-6, where 1 - 2p + sum p^2 has no digit left."""
    for gap in (3.0, 9.0, 13.8, 20.0):
        z = torch.tensor([[gap, 0.0, -0.5]])
        with torch.no_grad():
            score = vk.token_stats(z, torch.tensor([0])).score_sqnorm.double().item()
        p = torch.softmax(z.double(), -1)[0]
        want = ((p[1] + p[2]) ** 2 + p[1] ** 2 + p[2] ** 2).item()
        assert abs(score - want) <= 1e-3 * want


def test_sum_p_squared(implementation: str) -> None:
    logits, ids = row_inputs.make("normal", 5, 33, torch.float32)
    stats = vk.token_stats(logits * 3, ids)
    want = torch.softmax(logits.double() * 3, -1).square().sum(-1)
    torch.testing.assert_close(stats.sum_p_squared.double(), want, atol=3e-7, rtol=0)


# --- layouts ---------------------------------------------------------------------------------------------------------


def views(dtype: torch.dtype) -> dict[str, Tensor]:
    base = torch.randn(3, 9, 40).to(dtype)
    return {
        "all but the last": base[:, :-1],
        "every second row": base[:, ::2],
        "part of the vocabulary": base[..., 3:36],
        "transposed batch": base.transpose(0, 1),
        "one row expanded": base[:1, :1].expand(4, 5, 40),
        "four dimensions": base.reshape(3, 3, 3, 40),
        "three strides": torch.randn(4, 5, 6, 8).to(dtype)[::2, ::2, ::2],
        "a single row": base[0, 0],
    }


@pytest.mark.parametrize("name", views(torch.float32))
def test_strided_views(implementation: str, name: str) -> None:
    """Any strides with a contiguous last dimension give what a contiguous copy gives, to the bit."""
    logits = views(torch.bfloat16)[name]
    ids = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    g = torch.randn(ids.numel())
    stats, grad = run(logits, ids, g, g)
    copied, copied_grad = run(logits.contiguous(), ids, g, g)
    for field in FIELDS:
        assert getattr(stats, field).shape == ids.shape
        assert torch.equal(getattr(stats, field), getattr(copied, field)), field
    assert torch.equal(grad, copied_grad)


def test_views_are_not_copied(native: object) -> None:
    """The kernel is handed the view's own memory."""
    seen: list[int] = []
    logits = torch.randn(2, 9, 4096).bfloat16()
    backend = registry._load("native", "token_stats")
    forward = backend.forward
    try:
        backend.forward = lambda rows, *a, **k: (seen.append(rows.data_ptr()), forward(rows, *a, **k))[1]
        for view in (logits[:, :-1], logits[:, 1::2], logits[1:]):
            with vk.use_backend("native"):
                vk.token_stats(view, torch.zeros(view.shape[:-1], dtype=torch.int64))
            assert seen[-1] == view.data_ptr()
    finally:
        backend.forward = forward


@pytest.mark.parametrize("masked", (False, True))
def test_shift_is_slicing(implementation: str, masked: bool) -> None:
    """shift=True: entry t is about token t, read from logits row t - 1; entry 0 is 0 and its row T - 1 takes no gradient."""
    logits, ids = torch.randn(3, 6, 50), torch.randint(0, 50, (3, 6))
    mask = torch.rand(3, 6) < 0.6 if masked else None
    g = torch.randn(18)
    stats, grad = run(logits, ids, g, g, shift=True, mask=mask)
    sliced, sliced_grad = run(
        logits[:, :-1],
        ids[:, 1:],
        g.view(3, 6)[:, 1:].flatten(),
        g.view(3, 6)[:, 1:].flatten(),
        mask=None if mask is None else mask[:, 1:],
    )
    assert stats.shifted
    for field in FIELDS:
        assert torch.equal(getattr(stats, field)[:, 1:], getattr(sliced, field)), field
        assert bool((getattr(stats, field)[:, 0] == 0).all()), field
    assert torch.equal(grad[:, :-1], sliced_grad)
    assert bool((grad[:, -1] == 0).all())


def test_shift_of_one_token(implementation: str) -> None:
    """A sequence of one token has no prediction at all."""
    stats, grad = run(torch.randn(2, 1, 8), torch.tensor([[3], [99]]), torch.ones(2), torch.ones(2), shift=True)
    assert bool((stats.logp == 0).all())
    assert bool((grad == 0).all())


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 5, 8)])
def test_no_rows(implementation: str, shape: tuple[int, ...]) -> None:
    stats, grad = run(torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.int64), torch.ones(0), torch.ones(0))
    assert stats.logp.shape == shape[:-1]
    assert grad.shape == shape


# --- masks, NaN, inf -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_masked_rows_are_never_looked_at(implementation: str, dtype: torch.dtype) -> None:
    """NaN logits, ids of -100 and NaN upstream gradients at masked-out tokens come to nothing at all."""
    logits, ids = row_inputs.make("normal", 6, 100, dtype)
    mask = torch.tensor([1, 0, 1, 0, 1, 1], dtype=torch.bool)
    logits[~mask] = float("nan")
    ids[~mask] = -100
    g = torch.where(mask, torch.randn(6), float("nan"))
    z = logits.requires_grad_()
    stats = vk.token_stats(z, ids, mask)
    torch.autograd.backward([stats.logp, stats.entropy], [g, g])
    for field in FIELDS:
        assert bool((getattr(stats, field)[~mask] == 0).all())
    assert z.grad is not None
    assert bool((z.grad[~mask] == 0).all())
    assert bool(z.grad[mask].isfinite().all())


@pytest.mark.parametrize("dtype", (torch.int64, torch.float32, torch.uint8))
def test_mask_dtypes(implementation: str, dtype: torch.dtype) -> None:
    logits, ids = row_inputs.make("normal", 4, 10, torch.float32)
    mask = torch.tensor([1, 0, 1, 1])
    assert torch.equal(vk.token_stats(logits, ids, mask.to(dtype)).logp, vk.token_stats(logits, ids, mask.bool()).logp)


def test_zero_coefficients_write_zeros_and_read_nothing(implementation: str) -> None:
    """0 * inf = NaN is how a broken row reaches the optimizer; a row without a coefficient is not even read."""
    z = torch.randn(3, 64)
    z[1] = float("inf")
    z.requires_grad_()
    vk.token_stats(z, torch.tensor([1, 2, 3])).logp.mul(torch.tensor([1.0, 0.0, 1.0])).nan_to_num().sum().backward()
    assert z.grad is not None
    assert bool((z.grad[1] == 0).all())


@pytest.mark.parametrize("position", (0, 5, 63, 64, 4096, 5000))
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_nan_and_inf_logits_show(implementation: str, bad: float, position: int) -> None:
    """A NaN or +inf anywhere in a row makes its logp NaN (which vcpo_loss drops and counts), and no other row's."""
    logits, ids = row_inputs.make("normal", 3, 5001, torch.bfloat16)
    ids[:] = 7
    logits[1, position] = bad
    stats = vk.token_stats(logits, ids)
    assert stats.logp.isnan().tolist() == [False, True, False]
    assert stats.entropy.isnan().tolist() == [False, True, False]


def test_nan_among_minus_infinity(implementation: str) -> None:
    """A block of nothing but -inf is skipped; one with a NaN in it must not be."""
    z = torch.randn(2, 9000)
    z[:, 4096:8192] = float("-inf")
    z[1, 5000] = float("nan")
    assert vk.token_stats(z, torch.tensor([0, 0])).logp.isnan().tolist() == [False, True]


def test_leading_minus_infinity(implementation: str) -> None:
    """Blocks of -inf before the first finite logit leave no trace."""
    z = torch.full((1, 9000), float("-inf"))
    z[0, 8500:8700] = torch.randn(200) - 500
    got = vk.token_stats(z, torch.tensor([8600]))
    want = vk.token_stats(z[:, 8500:8700], torch.tensor([100]))
    torch.testing.assert_close(got.logp, want.logp)
    torch.testing.assert_close(got.entropy, want.entropy)


def test_target_at_minus_infinity(implementation: str) -> None:
    """A token the policy cannot emit: logp = -inf (a weight of 0), everything else finite, and the gradient too."""
    z = torch.tensor([[0.0, 1.0, float("-inf")]], requires_grad=True)
    stats = vk.token_stats(z, torch.tensor([2]))
    assert stats.logp.item() == -math.inf
    assert math.isfinite(stats.entropy.item())
    stats.logp.backward(torch.ones(1))
    assert z.grad is not None
    p = torch.softmax(z.detach()[:, :2], -1)
    torch.testing.assert_close(z.grad[:, :2], -p)
    assert z.grad[0, 2] == 1


# --- as a torch op ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", (False, True))
@pytest.mark.parametrize("softcap", (None, 2.0))
def test_gradcheck(shift: bool, softcap: float | None) -> None:
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.randint(0, 7, (2, 4)), torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.bool)

    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        stats = vk.token_stats(z, ids, mask, temperature=1.3, softcap=softcap, shift=shift)
        return stats.logp, stats.entropy

    assert torch.autograd.gradcheck(both, (logits,))


@pytest.mark.parametrize("shift", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_opcheck(shift: bool, masked: bool) -> None:
    """Schema, fake tensors, autograd registration and dynamic-shape tracing of all three ops."""
    logits, ids = torch.randn(2, 4, 7, requires_grad=True), torch.randint(0, 7, (2, 4))
    mask = torch.rand(2, 4) < 0.5 if masked else None
    ops = torch.ops.vcpo_kernels
    torch.library.opcheck(ops.token_stats.default, (logits, ids, mask, 1.0, None, shift, False))
    with torch.no_grad():
        logp, entropy, _, lse = ops.token_stats(logits, ids, mask, 1.0, None, shift, False)
    rest = (ids, mask, logp, entropy, lse, torch.randn(2, 4), None, 1.0, None, shift)
    torch.library.opcheck(ops.token_stats_backward.default, (logits.detach(), *rest))
    torch.library.opcheck(ops.token_stats_backward_.default, (logits.detach().clone(), *rest))


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
@pytest.mark.parametrize("view", (False, True))
def test_compiles_without_a_graph_break(backend: str, view: bool) -> None:
    base, ids = torch.randn(2, 6, 50), torch.randint(0, 50, (2, 5))

    def loss(z: Tensor) -> Tensor:
        logits = z[:, :-1] if view else z[:, :5].contiguous()
        stats = vk.token_stats(logits * 1.5, ids, inplace_backward=True)
        return (stats.logp + 0.1 * stats.entropy).sum()

    def gradient(f: object) -> Tensor:
        z = base.clone().requires_grad_()
        f(z).backward()  # type: ignore[operator]
        assert z.grad is not None
        return z.grad

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradient(compiled), gradient(loss))


def test_inplace_backward(implementation: str) -> None:
    """The gradient is the same to the bit, lies in the logits' own memory, and only there."""
    base = torch.randn(4, 9, 300, dtype=torch.bfloat16)
    ids, g = torch.randint(0, 300, (4, 8)), torch.randn(4, 8)
    results = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = leaf * 1  # what a module would compute
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        stats = vk.token_stats(logits[:, :-1], ids, inplace_backward=inplace)
        stats.logp.backward(g)
        results.append((leaf.grad, logits.detach()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], base)
    assert torch.equal(results[1][1][:, -1], base[:, -1])
    assert torch.equal(results[1][1][:, :-1], results[1][0][:, :-1])


def test_inplace_backward_is_seen_by_autograd() -> None:
    """Anyone else who needs the logits gets autograd's error instead of gradients of gradients."""
    leaf = torch.randn(3, 10, requires_grad=True)
    logits = leaf * 1
    other = logits.exp().sum() + logits.square().sum()  # square saves logits
    stats = vk.token_stats(logits, torch.tensor([1, 2, 3]), inplace_backward=True)
    stats.logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logp.sum().backward()


def test_only_logp_and_entropy_carry_gradients() -> None:
    stats = vk.token_stats(torch.randn(2, 5, requires_grad=True), torch.tensor([1, 2]))
    assert stats.logp.requires_grad
    assert stats.entropy.requires_grad
    assert not stats.score_sqnorm.requires_grad
    assert not stats.lse.requires_grad


def test_stride_zero_upstream_gradient(implementation: str) -> None:
    """`stats.logp.sum()` hands the backward an expanded scalar."""
    logits, ids = row_inputs.make("normal", 5, 40, torch.float32)
    z = logits.requires_grad_()
    vk.token_stats(z, ids).logp.sum().backward()
    want = torch.nn.functional.one_hot(ids, 40) - torch.softmax(logits.detach(), -1)
    torch.testing.assert_close(z.grad, want.float(), atol=1e-6, rtol=1e-5)


def test_bitwise_repeatable_and_independent_of_the_batch(implementation: str) -> None:
    """The same row gives the same bits again, alone, in another batch, and on another number of threads."""
    logits, ids = row_inputs.make("outliers", 40, 5000, torch.bfloat16)
    g = torch.randn(40)
    stats, grad = run(logits, ids, g, g)
    again, grad_again = run(logits, ids, g, g)
    part, grad_part = run(logits[7:9], ids[7:9], g[7:9], g[7:9])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single, grad_single = run(logits, ids, g, g)
    finally:
        torch.set_num_threads(threads)
    for field in FIELDS:
        value = getattr(stats, field)
        assert torch.equal(value, getattr(again, field))
        assert torch.equal(value, getattr(single, field))
        if implementation != "reference":  # eager torch sums a row differently in another batch
            assert torch.equal(value[7:9], getattr(part, field))
    assert torch.equal(grad, grad_again)
    assert torch.equal(grad, grad_single)
    if implementation != "reference":
        assert torch.equal(grad[7:9], grad_part)


# --- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocabulary=st.integers(2, 300),
    spread=st.floats(0.1, 30),
    shift_by=st.integers(-64, 64),
    seed=st.integers(0, 2**20),
)
def test_properties(rows: int, vocabulary: int, spread: float, shift_by: int, seed: int) -> None:
    """Logit-shift invariance, permutation of rows, bounds of the statistics, and sum of d logits = 0."""
    torch.manual_seed(seed)
    logits = (torch.randn(rows, vocabulary) * spread * 64).round() / 64  # so that adding an integer is exact
    ids = torch.randint(0, vocabulary, (rows,))
    stats, grad = run(logits, ids, torch.ones(rows), torch.ones(rows))
    moved, _ = run(logits + shift_by, ids, torch.ones(rows), None)
    torch.testing.assert_close(moved.logp, stats.logp, atol=2e-5, rtol=2e-6)
    torch.testing.assert_close(moved.entropy, stats.entropy, atol=2e-5, rtol=2e-6)
    order = torch.randperm(rows)
    permuted, permuted_grad = run(logits[order], ids[order], torch.ones(rows), torch.ones(rows))
    assert torch.equal(permuted.logp, stats.logp[order])
    assert torch.equal(permuted_grad, grad[order])
    assert bool((stats.logp <= 0).all())
    assert bool(((stats.entropy > -1e-6) & (stats.entropy <= math.log(vocabulary) + 1e-5)).all())
    assert bool(((stats.score_sqnorm >= 0) & (stats.score_sqnorm <= 2 + 1e-6)).all())
    size = grad.abs().sum(-1).clamp(min=1)
    assert bool((grad.sum(-1).abs() <= 1e-5 * size).all())


# --- errors ----------------------------------------------------------------------------------------------------------

LOGITS, IDS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, r"logits must be a torch.Tensor, got \[1.0\] \(list\)"),
        ({"logits": LOGITS.long()}, TypeError, "logits must be one of bfloat16, float16, float32, float64, got a int64"),
        ({"logits": torch.zeros(())}, ValueError, r"logits must be \[.., V\] with V >= 1"),
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"logits must be \[.., V\] with V >= 1"),
        ({"logits": torch.zeros(2, 5, 3).mT}, ValueError, r"contiguous in the last dimension, got strides \(15, 1, 3\)"),
        ({"token_ids": IDS.float()}, TypeError, r"token_ids must be one of int64, int32.*token_ids.long\(\)"),
        ({"token_ids": IDS[:, 1:]}, ValueError, r"token_ids must have shape \(2, 3\).*shift=True"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask must have shape \(2, 3\)"),
        ({"mask": torch.full((2, 3), 0.5)}, ValueError, "mask must hold only 0 and 1"),
        ({"temperature": 0}, ValueError, "temperature must be finite and > 0, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite and > 0, got nan"),
        ({"temperature": torch.tensor(1.0)}, TypeError, r"temperature must be a float > 0.*float\(temperature\)"),
        ({"softcap": -30.0}, ValueError, "softcap must be finite and > 0, got -30.0"),
        ({"softcap": "30"}, TypeError, "softcap must be a float > 0 or None"),
        ({"token_ids": IDS + 5}, ValueError, r"token_ids must lie in \[0, 5\).*got 5 at flat position 0 \(6 such\)"),
        ({"token_ids": IDS - 100}, ValueError, "Mask padding out"),
        ({"logits": LOGITS[0, 0], "token_ids": IDS[0, 0], "shift": True}, ValueError, r"shift=True wants logits \[.., T, V\]"),
        (
            {"logits": torch.zeros(2, 3, 5, requires_grad=True), "inplace_backward": True},
            ValueError,
            "inplace_backward=True would overwrite a leaf",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vk.token_stats(**{"logits": LOGITS, "token_ids": IDS, **arguments})  # type: ignore[arg-type]


def test_unknown_id_reads_nothing_out_of_bounds(native: object) -> None:
    """Where no check ran (a GPU cannot), the kernel itself turns an unknown id into NaN."""
    backend = registry._load("native", "token_stats")
    rows, ids = torch.randn(1, 3, 8), torch.tensor([[2, 8, -5]])
    logp, _, score, _ = backend.forward(rows, ids, None, temperature=1.0, softcap=None, shift=False)
    assert logp.isnan().tolist() == [[False, True, True]]
    assert score.isnan().tolist() == [[False, True, True]]
