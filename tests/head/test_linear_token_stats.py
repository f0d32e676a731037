"""linear_token_stats against whole logits in float64: every memory mode, chunk size, mask, dtype; and as a torch op."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vcpo_kernels as vk
from tests.head import head_inputs
from tests.head.head_inputs import FIELDS, distance, make, through_head, through_logits
from vcpo_kernels.head import kept_scores
from vcpo_kernels.head.operands import Head

# Relative L2. In bf16 and fp16 the logits themselves are rounded once; eager torch has the same error (see the test).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
MODES = {
    "fast": {"memory": "fast"},
    "lean": {"memory": "lean"},
    "fast, small chunks": {"memory": "fast", "chunk_bytes": 5000},
    "lean, small chunks": {"memory": "lean", "chunk_bytes": 5000},
    "lean, a row at a time": {"memory": "lean", "chunk_bytes": 1},
    "auto": {"memory": "auto"},
    "auto, no room": {"memory": "auto", "fast_bytes": 0, "chunk_bytes": 9000},
}
SWITCHES = [
    dict(zip(("bias", "masked", "entropy"), on, strict=True)) for on in itertools.product((False, True), repeat=3)
]


def assert_same(
    got: tuple[vk.TokenStats, list[Tensor]], want: tuple[vk.TokenStats, list[Tensor]], bound: float
) -> None:
    for field in FIELDS:
        assert distance(getattr(got[0], field), getattr(want[0], field)) <= bound, field
    for name, a, b in zip(("hidden", "weight", "bias"), got[1], want[1], strict=False):
        assert a.shape == b.shape
        assert distance(a, b) <= bound, f"gradient of {name}: {distance(a, b):.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(k for k, v in s.items() if v) or "plain")
def test_equals_whole_logits(switches: dict[str, bool], mode: str, dtype: torch.dtype) -> None:
    x = make(dtype, **switches)
    options = {"temperature": 0.9, "softcap": 6.0 if switches["masked"] else None, "shift": switches["bias"]}
    want = through_logits(x, **options)
    got = through_head(x, **MODES[mode], **options)
    # what the rounding of the logits costs anyone: eager torch in the same dtype, twice over
    eager = through_logits(x, dtype, **options)
    errors = [distance(a, b) for a, b in zip(eager[1], want[1], strict=True)]
    assert_same(got, want, max(TOLERANCE[dtype], 2 * max(errors)))
    assert max(errors) <= 3e-2
    assert all(g.dtype == dtype for g in got[1])


@pytest.mark.parametrize("mode", ("fast", "lean, small chunks"))
@pytest.mark.parametrize("entropy", (False, True))
def test_every_backend(implementation: str, mode: str, entropy: bool) -> None:
    x = make(torch.float32, bias=True, masked=True, entropy=entropy)
    assert_same(through_head(x, **MODES[mode]), through_logits(x), 2e-6)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_frozen_weight(dtype: torch.dtype, entropy: bool, masked: bool) -> None:
    """LoRA, a frozen head: the hidden state's gradient alone, and nothing of size [N, V] kept for it."""
    x = make(dtype, masked=masked, entropy=entropy, bias=True)
    want = through_logits(x)
    hidden = x.hidden.clone().requires_grad_()
    stats = vk.linear_token_stats(hidden, x.weight, x.token_ids, x.bias, x.mask, chunk_bytes=9000)
    kept = [t for t in stats.logp.grad_fn.saved_tensors if t is not None]
    assert max(t.numel() for t in kept if t.data_ptr() != x.weight.data_ptr()) <= hidden.numel()
    (grad,) = torch.autograd.grad(head_inputs.upstream(stats, x), hidden)
    bound = 2 * TOLERANCE[dtype]
    assert distance(grad, want[1][0]) <= bound
    assert distance(stats.logp, want[0].logp) <= bound


@pytest.mark.parametrize("only", (0, 1, 2))
@pytest.mark.parametrize("mode", ("fast", "lean"))
def test_one_gradient_alone(mode: str, only: int) -> None:
    """Whichever of hidden, weight and bias is to be trained."""
    x = make(torch.float32, bias=True, masked=True)
    want = through_logits(x)[1][only]
    operands = [t.clone() for t in (x.hidden, x.weight, x.bias)]
    operands[only].requires_grad_()
    hidden, weight, bias = operands
    stats = vk.linear_token_stats(hidden, weight, x.token_ids, bias, x.mask, **MODES[mode])
    head_inputs.upstream(stats, x).backward()
    assert [t.grad is not None for t in operands] == [i == only for i in range(3)]
    assert distance(operands[only].grad, want) <= 2e-6


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 12),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 200),
    chunk=st.integers(1, 4000),
    masked=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_chunks_change_nothing_but_rounding(
    tokens: int, width: int, vocabulary: int, chunk: int, masked: bool, seed: int
) -> None:
    """fast = lean = any chunk = whole logits, in float64 to its rounding."""
    torch.manual_seed(seed)
    x = make(torch.float64, (tokens,), width, vocabulary, bias=True, masked=masked, entropy=bool(seed % 2))
    want = through_logits(x)
    for memory in ("fast", "lean"):
        assert_same(through_head(x, memory=memory, chunk_bytes=chunk), want, 1e-11)


def test_bitwise_repeatable() -> None:
    x = make(torch.bfloat16, masked=True, bias=True)
    for mode in MODES.values():
        once, again = through_head(x, **mode), through_head(x, **mode)
        assert all(torch.equal(a, b) for a, b in zip(once[1], again[1], strict=True))
        assert torch.equal(once[0].logp, again[0].logp)


def test_gemms_see_only_rows_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked rows are dropped before the first GEMM, rows without a gradient before the backward's."""
    rows: list[int] = []
    gradient_rows: list[int] = []
    logits, gradients = Head.logits, kept_scores.gradients
    monkeypatch.setattr(Head, "logits", lambda self, *a, **k: (rows.append(self.rows), logits(self, *a, **k))[1])
    monkeypatch.setattr(
        kept_scores, "gradients", lambda head, *a: (gradient_rows.append(head.rows), gradients(head, *a))[1]
    )
    x = make(torch.float32, (20,))
    mask = torch.arange(20) % 2 == 0
    x = replace(x, mask=mask, g=torch.where(torch.arange(20) < 8, 1.0, 0.0))
    for memory in ("fast", "lean"):
        rows.clear(), gradient_rows.clear()
        got = through_head(x, memory=memory)
        assert rows[0] == 10
        assert gradient_rows == [4]
        assert_same(got, through_logits(x), 2e-6)
        assert bool((got[1][0][8:] == 0).all())


def test_masked_rows_are_never_looked_at() -> None:
    """NaN hidden states, ids of -100 and NaN upstream gradients at masked-out tokens come to nothing at all."""
    x = make(torch.float32, (12,), entropy=True)
    mask = torch.arange(12) % 3 != 0
    hidden, ids = x.hidden.clone(), x.token_ids.clone()
    hidden[~mask] = math.nan
    ids[~mask] = -100
    g = torch.where(mask, x.g, math.nan)
    for mode in MODES.values():
        h, w = hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
        stats = vk.linear_token_stats(h, w, ids, mask=mask, **mode)
        torch.autograd.backward([stats.logp, stats.entropy], [g, g])
        assert bool((h.grad[~mask] == 0).all())
        assert bool(h.grad[mask].isfinite().all())
        assert bool(w.grad.isfinite().all())
        assert bool((stats.logp[~mask] == 0).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (3, 1), (4,)])
def test_no_rows(mode: str, shape: tuple[int, ...]) -> None:
    """No tokens, none that the mask leaves, none with a prediction: zero gradients, not garbage."""
    x = make(torch.float32, shape, bias=True)
    x = replace(x, mask=torch.zeros(shape, dtype=torch.bool) if shape == (4,) else None)
    stats, grads = through_head(x, shift=shape == (3, 1), **MODES[mode])
    assert stats.logp.shape == shape
    assert bool((stats.logp == 0).all())
    assert [g.shape for g in grads] == [x.hidden.shape, x.weight.shape, x.bias.shape]
    assert all(bool((g == 0).all()) for g in grads)


def test_no_gradient_arrives() -> None:
    """A batch of zero-advantage groups: exactly zero, and NaN hidden states beside it do not come through."""
    x = make(torch.float32, (5,))
    for memory in ("fast", "lean"):
        _, grads = through_head(replace(x, g=torch.zeros(5)), memory=memory)
        assert all(bool((g == 0).all()) for g in grads)


# --- layouts and dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("sliced", "transposed", "expanded", "no batch"))
def test_strided_hidden(name: str) -> None:
    base = torch.randn(3, 8, 19)
    hidden = {
        "sliced": base[:, :-1, 2:15],
        "transposed": base.transpose(0, 1),
        "expanded": base[:1].expand(4, 8, 19),
        "no batch": base[0, 0],
    }[name]
    x = make(torch.float32, tuple(hidden.shape[:-1]), hidden.shape[-1])
    x = replace(x, hidden=hidden)
    assert_same(through_head(x, memory="lean", chunk_bytes=4000), through_logits(x), 2e-6)


def test_transposed_weight() -> None:
    """A head stored as [H, V] (GPT-2's Conv1D way) goes in as a view."""
    x = make(torch.float32)
    stored = x.weight.T.contiguous().requires_grad_()
    stats = vk.linear_token_stats(x.hidden, stored.T, x.token_ids, memory="lean", chunk_bytes=4000)
    (grad,) = torch.autograd.grad(head_inputs.upstream(stats, x), stored)
    assert distance(grad.T, through_logits(x)[1][1]) <= 2e-6


@pytest.mark.parametrize("mode", ("fast", "lean"))
def test_tied_weight(mode: str) -> None:
    """One parameter as embedding and head gets both gradients."""
    x = make(torch.float32)
    results = []
    for fused in (True, False):
        table = x.weight.clone().requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(x.token_ids, table))
        if fused:
            stats = vk.linear_token_stats(hidden, table, x.token_ids, shift=True, **MODES[mode])
        else:
            stats = vk.token_stats(hidden @ table.T, x.token_ids, shift=True)
        results.append(torch.autograd.grad(head_inputs.upstream(stats, x), table)[0])
    assert distance(results[0], results[1]) <= 2e-6


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float64)],
)
def test_mixed_dtypes_meet_where_torch_promotes(hidden: torch.dtype, weight: torch.dtype) -> None:
    """No rounding that the caller did not ask for; each gradient comes back in its own operand's dtype."""
    x = make(torch.float32)
    x = replace(x, hidden=x.hidden.to(hidden), weight=x.weight.to(weight))
    stats, grads = through_head(x)
    want, want_grads = through_logits(x)
    assert distance(stats.logp, want.logp) <= 2e-6
    for got, exact, dtype in zip(grads, want_grads, (hidden, weight), strict=True):
        assert got.dtype == dtype
        assert distance(got, exact) <= {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 2e-6)


@pytest.mark.cpu_only("enters the CPU's autocast")
@pytest.mark.parametrize("mode", ("fast", "lean"))
def test_autocast_casts_as_linear_does(mode: str) -> None:
    x = make(torch.float32, bias=True)
    cast = replace(x, hidden=x.hidden.bfloat16(), weight=x.weight.bfloat16(), bias=x.bias.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        stats, grads = through_head(x, **MODES[mode])
    want, want_grads = through_head(cast, **MODES[mode])
    assert torch.equal(stats.logp, want.logp)
    for got, exact in zip(grads, want_grads, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, exact.float())


@pytest.mark.cpu_only("enters the CPU's autocast")
def test_float32_under_disabled_autocast_stays_float32() -> None:
    x = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        got = through_head(x)
    assert_same(got, through_logits(x), 2e-6)


def test_auto_takes_what_fits() -> None:
    x = make(torch.float32, (10,))
    size = 10 * len(x.weight) * 4
    for room, rows in ((size, 10), (size - 1, 0)):
        leaves = x.leaves()
        stats = vk.linear_token_stats(*leaves, x.token_ids, fast_bytes=room)
        assert stats.logp.grad_fn.saved_tensors[-1].shape[0] == rows


# --- as a torch op ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ("fast", "lean"))
@pytest.mark.parametrize("masked", (False, True))
def test_gradcheck(masked: bool, memory: str) -> None:
    x = make(torch.float64, (2, 4), 3, 7, bias=True, masked=masked)

    def both(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = leaves
        stats = vk.linear_token_stats(
            hidden, weight, x.token_ids, bias, x.mask, 1.3, 2.0, shift=True, memory=memory, chunk_bytes=100
        )
        return stats.logp, stats.entropy

    assert torch.autograd.gradcheck(both, x.leaves())


@pytest.mark.cpu_only("schemas and fakes are the same on every device")
@pytest.mark.parametrize("memory", ("auto", "fast", "lean"))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("shift", (False, True))
def test_opcheck(shift: bool, masked: bool, memory: str) -> None:
    """Schema, fakes, autograd registration and dynamic-shape tracing of both ops."""
    x = make(torch.float32, (2, 5), 4, 11, bias=True, masked=masked)
    hidden, weight, bias = x.leaves()
    arguments = (hidden, weight, bias, x.token_ids, x.mask, 0.9, None, shift, memory, 1000, None, True, True, True)
    torch.library.opcheck(torch.ops.vcpo_kernels.linear_token_stats.default, arguments)
    with torch.no_grad():
        logp, entropy, _, *saved = torch.ops.vcpo_kernels.linear_token_stats(*arguments)
    operands = (hidden.detach(), weight.detach(), bias.detach(), x.token_ids, x.mask)
    backward = (*operands, logp, entropy, *saved, x.g, None, 0.9, None, shift, 1000, True, True, True)
    torch.library.opcheck(torch.ops.vcpo_kernels.linear_token_stats_backward.default, backward)


@pytest.mark.cpu_only("graphs are the same on every device")
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("memory", ("auto", "fast", "lean"))
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiles_without_a_graph_break(backend: str, memory: str, masked: bool) -> None:
    if torch.__version__ < "2.7" and (masked or memory == "auto"):
        pytest.skip("torch 2.6 breaks the graph at an op whose outputs' sizes depend on values")
    torch._dynamo.reset()  # each case compiles the same function anew, and there is a limit on that
    x = make(torch.float32, masked=masked)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = vk.linear_token_stats(hidden * 1.5, weight, x.token_ids, mask=x.mask, shift=True, memory=memory)
        return head_inputs.upstream(stats, x)

    leaves = x.leaves()
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointed() -> None:
    """Recomputed under torch.utils.checkpoint, as a trainer wraps its last layers."""
    x = make(torch.float32, masked=True)
    hidden, weight = x.leaves()
    logp = torch.utils.checkpoint.checkpoint(
        lambda h, w: vk.linear_token_stats(h, w, x.token_ids, mask=x.mask).logp, hidden, weight, use_reentrant=False
    )
    grads = torch.autograd.grad((logp * x.g).sum(), (hidden, weight))
    for a, b in zip(grads, through_logits(x)[1], strict=True):
        assert distance(a, b) <= 2e-6


def test_retained_graph() -> None:
    for memory in ("fast", "lean"):
        x = make(torch.float32, masked=True)
        leaves = x.leaves()
        loss = head_inputs.upstream(vk.linear_token_stats(*leaves, x.token_ids, mask=x.mask, memory=memory), x)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "linear_token_stats: hidden must be a torch.Tensor"),
        ({"hidden": torch.zeros(2, 3, 4).long()}, TypeError, "hidden must be one of bfloat16"),
        ({"hidden": torch.zeros(2, 3, 0)}, ValueError, r"hidden must be \[.., H\] with H >= 1"),
        ({"weight": torch.zeros(4, 7)}, ValueError, r"weight must be \[V, 4\].*goes in as weight.T"),
        ({"weight": torch.zeros(7, 4, 1)}, ValueError, r"weight must be \[V, 4\]"),
        ({"weight": torch.zeros(7, 4, device="meta")}, ValueError, "weight is on meta but hidden is on cpu"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(7,\)"),
        ({"token_ids": torch.zeros(2, 2).long()}, ValueError, r"token_ids must have shape \(2, 3\).*shift=True"),
        ({"token_ids": torch.zeros(2, 3)}, TypeError, r"token_ids must be one of int64, int32.*long\(\)"),
        ({"token_ids": torch.full((2, 3), 7)}, ValueError, r"token_ids must lie in \[0, 7\).*got 7 at flat position 0"),
        ({"mask": torch.full((2, 3), 0.5)}, ValueError, "mask must hold only 0 and 1"),
        ({"memory": "faster"}, ValueError, "memory must be one of 'auto', 'fast', 'lean', got 'faster'"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be an int >= 1, got 0"),
        ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes must be an int >= 1"),
        ({"fast_bytes": -1}, ValueError, "fast_bytes must be an int >= 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and > 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be finite and > 0"),
        ({"hidden": torch.zeros(4), "token_ids": torch.tensor(0), "shift": True}, ValueError, "shift=True wants hidden"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    valid = {"hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(7, 4), "token_ids": torch.zeros(2, 3).long()}
    with pytest.raises(error, match=message):
        vk.linear_token_stats(**{**valid, **arguments})  # type: ignore[arg-type]
