"""token_stats against the float64 reference on every backend that runs here: numbers, layouts, masks.

Its behaviour as a torch op is in test_token_stats_op.py; the triton backend runs the same grid in tests/backends/triton.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.rows import row_inputs
from tests.rows.row_checks import FIELDS, assert_gradient, assert_statistics, oracle, run
from vcpo_kernels.core import registry

# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", row_inputs.VOCABULARIES)
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("kind", row_inputs.KINDS)
def test_matches_float64(implementation: str, kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    """The largest grid of the suite, and all of it: what breaks is a combination. Each vocabulary takes another way through
    the blocks and their tails, each dtype another conversion in each instruction set, each kind another branch (a new
    reference, a block done again, a tail of -inf); errors of peers were in single cells of it. 792 cases take some 5 s.
    """
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
