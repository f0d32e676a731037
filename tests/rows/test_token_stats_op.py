"""token_stats as a torch op: autograd, torch.compile, in-place gradients, repeatability, properties, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vcpo_kernels as vk
from tests.rows import row_inputs
from tests.rows.row_checks import FIELDS, run
from vcpo_kernels.core import registry


@pytest.mark.parametrize("shift", (False, True))
@pytest.mark.parametrize("softcap", (None, 2.0))
def test_gradcheck(shift: bool, softcap: float | None) -> None:
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.randint(0, 7, (2, 4)), torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.bool)

    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        stats = vk.token_stats(z, ids, mask, temperature=1.3, softcap=softcap, shift=shift)
        return stats.logp, stats.entropy

    assert torch.autograd.gradcheck(both, (logits,))


@pytest.mark.cpu_only("schemas and fakes are the same on every device")
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


@pytest.mark.cpu_only("graphs are the same on every device")
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


@pytest.mark.cpu_only("checks read values only on a CPU")
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


# --- gradients in place ----------------------------------------------------------------------------------------------

OVERLAPPING = {
    "expanded rows": lambda z: z[:1].expand(4, 6),
    "expanded batch": lambda z: z[None].expand(3, 4, 6),
    "expanded inside": lambda z: z[:, None].expand(4, 3, 6),
    "unfolded": lambda z: z.view(-1).unfold(0, 6, 2),
    "as_strided": lambda z: z.as_strided((3, 6), (5, 1)),
    "as_strided, no two dimensions merge": lambda z: z.as_strided((2, 2, 2, 3), (7, 4, 2, 1)),
}
OWN = {
    "every second row": lambda z: z[::2],
    "some entries": lambda z: z[:, 1:4],
    "transposed batch": lambda z: z.view(2, 2, 6).transpose(0, 1),
    "one row, stride 0": lambda z: z[:1].as_strided((1, 6), (0, 1)),
    "no rows": lambda z: z[:0].expand(3, 0, 6),
}


def both_ways(z: torch.Tensor) -> list[tuple[str, Any]]:
    ids, c = torch.zeros(z.shape[:-1], dtype=torch.int64), torch.ones(z.shape[:-1])
    return [
        ("inplace_backward", lambda: vk.token_stats(z, ids, inplace_backward=True).logp.sum()),
        ("inplace", lambda: vk.weighted_logp(z, ids, c, inplace=True)[0]),
    ]


@pytest.mark.parametrize("view", OVERLAPPING)
def test_memory_that_entries_share_is_not_written_in_place(view: str) -> None:
    """Each entry's gradient would overwrite another's; torch's own in-place ops refuse it too."""
    z = OVERLAPPING[view](torch.randn(4, 6, requires_grad=True) * 1)
    for name, run_it in both_ways(z):
        with pytest.raises(
            ValueError, match=rf"{name}=True would write several entries' gradients to one memory.*clone\(\)"
        ):
            run_it()


@pytest.mark.parametrize("view", OWN)
def test_views_of_their_own_memory_are_written_in_place(view: str) -> None:
    leaf = torch.randn(4, 6, requires_grad=True)
    z = OWN[view](leaf * 1)
    (want,) = torch.autograd.grad(vk.token_stats(z, torch.zeros(z.shape[:-1], dtype=torch.int64)).logp.sum(), leaf)
    for k in range(2):
        z = OWN[view](leaf * 1)
        torch.testing.assert_close(torch.autograd.grad(both_ways(z)[k][1](), leaf)[0], want)


@pytest.mark.parametrize("view", (lambda z: z[1:], lambda z: z.view(2, 2, 6), lambda z: z[:, 2:]))
def test_a_view_of_a_leaf_is_refused_as_the_leaf_is(view: Any) -> None:
    """A parameter's values would be lost through its view."""
    z = view(torch.randn(4, 6, requires_grad=True))
    for name, run_it in both_ways(z):
        with pytest.raises(ValueError, match=rf"{name}=True would overwrite a leaf.*of which logits are a view"):
            run_it()
