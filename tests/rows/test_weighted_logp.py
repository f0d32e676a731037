"""weighted_logp: the value and gradient of sum_t c_t logp_t from one pass, against token_stats and its backward."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.rows import row_inputs
from tests.rows.row_checks import FIELDS, OUTPUT_EPS

GRID = [(shift, masked, softcap) for shift in (False, True) for masked in (False, True) for softcap in (None, 4.0)]


def batch(dtype: torch.dtype = torch.float32, masked: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """logits [3, 7, 50], ids, coefficients with some zeros, and a mask or None."""
    logits, ids = torch.randn(3, 7, 50).to(dtype) * 2, torch.randint(0, 50, (3, 7))
    c = torch.randn(3, 7)
    c[1, 2:5] = 0
    return logits, ids, c, (torch.rand(3, 7) < 0.6 if masked else None)


def in_two_passes(logits: Tensor, ids: Tensor, c: Tensor, mask: Tensor | None, **options: object) -> tuple[Tensor, ...]:
    """loss, d logits and d c of the same sum through token_stats."""
    z, c = logits.detach().requires_grad_(), c.detach().requires_grad_()
    stats = vk.token_stats(z, ids, mask, **options)
    loss = (stats.logp * c).sum()
    return (loss.detach(), *torch.autograd.grad(loss, (z, c)), stats)


def in_one_pass(
    logits: Tensor, ids: Tensor, c: Tensor, mask: Tensor | None, upstream: float = 1.0, **options: object
) -> tuple[Tensor, ...]:
    z, c = logits.detach().clone().requires_grad_(), c.detach().requires_grad_()
    loss, stats = vk.weighted_logp(z * 1, ids, c, mask, **options)
    return (loss.detach(), *torch.autograd.grad(loss * upstream, (z, c)), stats)


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
@pytest.mark.parametrize(("shift", "masked", "softcap"), GRID)
def test_equals_token_stats_and_its_backward(
    implementation: str, shift: bool, masked: bool, softcap: float | None, dtype: torch.dtype, inplace: bool
) -> None:
    logits, ids, c, mask = batch(dtype, masked)
    options = {"temperature": 0.8, "softcap": softcap, "shift": shift}
    want_loss, want_grad, want_c, want = in_two_passes(logits, ids, c, mask, **options)
    loss, grad, grad_c, stats = in_one_pass(logits, ids, c, mask, inplace=inplace, **options)
    torch.testing.assert_close(loss, want_loss)
    # Two passes round logp to fp32 in between. Against float64: tests/test_score_rows.py.
    torch.testing.assert_close(grad, want_grad, rtol=OUTPUT_EPS[dtype] + 1e-6, atol=2e-7)
    torch.testing.assert_close(grad_c, want_c)
    for field in FIELDS:
        assert torch.equal(getattr(stats, field), getattr(want, field))
        assert not getattr(stats, field).requires_grad
    assert stats.shifted == shift


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("upstream", (-0.25, 0.0, 3.0))
def test_any_upstream_gradient(implementation: str, upstream: float, inplace: bool) -> None:
    """A loss that is averaged, negated or scaled for mixed precision; ignoring that is a bug peers have shipped."""
    logits, ids, c, mask = batch()
    _, want_grad, want_c, _ = in_two_passes(logits, ids, c * upstream, mask)
    _, grad, grad_c, _ = in_one_pass(logits, ids, c, mask, upstream, inplace=inplace)
    torch.testing.assert_close(grad, want_grad)
    torch.testing.assert_close(grad_c, want_c * upstream)


def test_a_factor_of_one_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that the forward wrote is the one that arrives: same memory, nothing multiplied."""
    logits, ids, c, _ = batch()
    leaf = logits.clone().requires_grad_()
    z = leaf * 1
    seen: list[int] = []
    z.register_hook(lambda g: seen.append(g.data_ptr()))
    loss, _ = vk.weighted_logp(z, ids, c, inplace=True)
    multiplied: list[Tensor] = []
    monkeypatch.setattr(Tensor, "mul_", lambda self, other: multiplied.append(self))
    loss.backward()
    assert seen == [z.data_ptr()]
    assert not multiplied


@pytest.mark.parametrize("inplace", (False, True))
def test_retained_graph(inplace: bool) -> None:
    """Each backward through a kept graph gives the same, whatever was done with the last one's gradient."""
    logits, ids, c, _ = batch()
    z = logits.clone().requires_grad_()
    loss, _ = vk.weighted_logp(z * 1, ids, c, inplace=inplace)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss * 2, z, retain_graph=True)
    (third,) = torch.autograd.grad(loss, z)
    assert torch.equal(second, kept * 2)
    assert torch.equal(third, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


def test_coefficients_of_zero_take_no_part(implementation: str) -> None:
    """0 * -inf: a token the policy cannot emit, in a sequence that was dropped, must not make the loss NaN."""
    logits = torch.zeros(2, 3)
    logits[0, 2] = -math.inf
    z = logits.requires_grad_()
    loss, stats = vk.weighted_logp(z, torch.tensor([2, 1]), torch.tensor([0.0, 1.0]))
    loss.backward()
    assert stats.logp[0] == -math.inf
    assert math.isfinite(loss.item())
    assert z.grad is not None
    assert bool((z.grad[0] == 0).all())


@pytest.mark.parametrize("shift", (False, True))
def test_masked_rows_are_never_looked_at(implementation: str, shift: bool) -> None:
    """NaN logits, ids of -100 and NaN coefficients outside the mask come to nothing at all."""
    logits, ids, c, mask = batch(masked=True)
    live = mask.clone()
    live[:, 0] &= not shift
    rows = live.roll(-1, 1) if shift else live
    logits[~rows] = math.nan
    ids[~live] = -100
    c[~live] = math.nan
    z = logits.requires_grad_()
    loss, _ = vk.weighted_logp(z, ids, c, mask, shift=shift)
    loss.backward()
    assert math.isfinite(loss.item())
    assert z.grad is not None
    assert bool((z.grad[~rows] == 0).all())
    assert bool(z.grad.isfinite().all())


def test_inplace_is_seen_by_autograd() -> None:
    """Whoever else needs the logits gets autograd's error; a leaf is refused."""
    logits, ids, c, _ = batch()
    leaf = logits.clone().requires_grad_()
    z = leaf * 1
    other = z.square().sum()
    loss, _ = vk.weighted_logp(z, ids, c, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    loss.backward()
    with pytest.raises(ValueError, match="weighted_logp: inplace=True would overwrite a leaf"):
        vk.weighted_logp(leaf, ids, c, inplace=True)


def test_inplace_on_a_slice_reaches_what_it_was_cut_from(implementation: str) -> None:
    """A bumped version makes autograd rebuild a view's history; the gradient must still arrive, and only there."""
    logits, ids, c, _ = batch()
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        whole = leaf * 1
        loss, _ = vk.weighted_logp(whole[:, :-1], ids[:, 1:], c[:, 1:], inplace=inplace)
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert torch.equal(whole.detach()[:, -1], logits[:, -1])


def test_without_gradients_nothing_is_written() -> None:
    logits, ids, c, _ = batch()
    before = logits.clone()
    loss, stats = vk.weighted_logp(logits, ids, c, inplace=True)
    assert torch.equal(logits, before)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, (stats.logp * c).sum())
    with torch.no_grad():
        loss, _ = vk.weighted_logp(logits.requires_grad_(), ids, c)
    assert not loss.requires_grad


def test_memory_is_freed_with_the_loss() -> None:
    """The graph node holds the gradient, and nothing holds the node in a cycle."""
    logits, ids, c, _ = batch()
    gc.disable()
    try:
        loss, _ = vk.weighted_logp(logits.requires_grad_(), ids, c)
        held = [weakref.ref(t) for t in loss.grad_fn.known_gradients]
        assert held
        del loss
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


def test_strides_that_need_more_than_two_dimensions(implementation: str) -> None:
    logits = torch.randn(4, 5, 6, 8)[::2, ::2, ::2].requires_grad_()
    ids, c = torch.randint(0, 8, logits.shape[:-1]), torch.randn(logits.shape[:-1])
    loss, stats = vk.weighted_logp(logits, ids, c)
    (grad,) = torch.autograd.grad(loss, logits)
    want_loss, want_grad, _, _ = in_two_passes(logits.detach(), ids, c, None)
    torch.testing.assert_close(loss.detach(), want_loss)
    torch.testing.assert_close(grad, want_grad)
    assert stats.logp.shape == ids.shape


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(implementation: str, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, requires_grad=True)
    loss, _ = vk.weighted_logp(z, torch.zeros(shape[:-1], dtype=torch.int64), torch.zeros(shape[:-1]))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert z.grad.shape == shape


@pytest.mark.parametrize("shift", (False, True))
def test_gradcheck(shift: bool) -> None:
    logits, ids, c, mask = batch(masked=True)
    z, c = logits[:2, :4, :7].double().requires_grad_(), c[:2, :4].double().requires_grad_()
    ids, mask = ids[:2, :4] % 7, mask[:2, :4]

    def loss(z: Tensor, c: Tensor) -> Tensor:
        return vk.weighted_logp(z, ids, c, mask, temperature=1.3, softcap=2.0, shift=shift)[0]

    assert torch.autograd.gradcheck(loss, (z, c))


@pytest.mark.cpu_only("schemas and fakes are the same on every device")
@pytest.mark.parametrize("masked", (False, True))
def test_opcheck(masked: bool) -> None:
    logits, ids, c, mask = batch(masked=masked)
    arguments = (ids, mask, c, 1.0, None, True)
    torch.library.opcheck(torch.ops.vcpo_kernels.weighted_logp.default, (logits.requires_grad_(), *arguments, True))
    torch.library.opcheck(torch.ops.vcpo_kernels.weighted_logp_.default, (logits.detach().clone(), *arguments))
    torch.library.opcheck(torch.ops.vcpo_kernels.scale_.default, (logits.detach().clone(), torch.tensor(0.5)))


@pytest.mark.cpu_only("graphs are the same on every device")
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiles_without_a_graph_break(backend: str) -> None:
    logits, ids, c, _ = batch()

    def loss(z: Tensor, c: Tensor) -> Tensor:
        return -0.5 * vk.weighted_logp(z * 1.5, ids, c, shift=True, inplace=True)[0]

    z, c = logits.requires_grad_(), c.requires_grad_()
    want = torch.autograd.grad(loss(z, c), (z, c))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(z, c), (z, c))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"coefficients": [1.0]}, TypeError, r"weighted_logp: coefficients must be a torch.Tensor"),
        ({"coefficients": torch.ones(3)}, ValueError, r"coefficients must have shape \(3, 7\).*segments.spread"),
        ({"coefficients": torch.ones(3, 7, dtype=torch.int64)}, TypeError, "coefficients must be one of bfloat16"),
        ({"token_ids": torch.full((3, 7), 50)}, ValueError, r"weighted_logp: token_ids must lie in \[0, 50\)"),
        ({"temperature": 0.0}, ValueError, "weighted_logp: temperature must be finite and > 0"),
        ({"mask": torch.ones(3, 6)}, ValueError, r"weighted_logp: mask must have shape \(3, 7\)"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    logits, ids, c, _ = batch()
    with pytest.raises(error, match=message):
        vk.weighted_logp(**{"logits": logits, "token_ids": ids, "coefficients": c, **arguments})  # type: ignore[arg-type]
