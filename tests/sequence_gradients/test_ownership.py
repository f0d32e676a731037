"""The probe: a row whose gradient is not its own sequence's is an error, whatever its shape says, and never a wrong norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vcpo_kernels as vk
from tests.sequence_gradients.models import VOCABULARY, assert_gradients, assert_norms, oracle
from tests.sequence_gradients.reordering import (
    IN_PLACE,
    REORDERED,
    WIDTH,
    Inner,
    Inside,
    batch,
    by_expert,
    by_length,
    plain,
    reversed_batch,
    scalars,
)
from vcpo_kernels.sequence_gradients import ownership

MIXED = r"rows of sequence \d+ do not carry the gradient of per_sequence\[\d+\] alone.*OPOBAccumulator"


@pytest.mark.parametrize("size", (4, 5))
@pytest.mark.parametrize("inside", REORDERED, ids=lambda f: f.__name__)
def test_rows_of_others_are_refused(inside: Inside, size: int) -> None:
    """B == T, where no shape can tell."""
    model, (ids, seg) = Inner(inside), batch(size, size)
    with vk.SequenceGradients(model) as grads, pytest.raises(RuntimeError, match=MIXED):
        grads.backward(scalars(model, ids, seg), seg)


@pytest.mark.parametrize("inside", REORDERED, ids=lambda f: f.__name__)
def test_another_shape_is_refused_too(inside: Inside) -> None:
    """B != T: by the shape or by the probe."""
    model, (ids, seg) = Inner(inside), batch(3, 7)
    with vk.SequenceGradients(model) as grads, pytest.raises(RuntimeError, match=f"{MIXED}|leading dimensions"):
        grads.backward(scalars(model, ids, seg), seg)


@pytest.mark.parametrize("shape", ((4, 4), (3, 7), (2, 2), (1, 5), (40, 3)), ids=str)
@pytest.mark.parametrize("inside", IN_PLACE, ids=lambda f: f.__name__)
def test_rows_of_ones_own_are_exact(inside: Inside, shape: tuple[int, int]) -> None:
    """What moves within a sequence, or mixes without a gradient, is nobody else's."""
    model, (ids, seg) = Inner(inside), batch(*shape)
    want = oracle(model, lambda m: scalars(m, ids, seg), shape[0])
    c = torch.randn(shape[0])
    with vk.SequenceGradients(model, check="always") as grads:
        grads.backward(scalars(model, ids, seg), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(c)
    assert_gradients(model, want.weighted(-c))


@pytest.mark.cpu_only("enters the CPU's autocast")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("autocast", (False, True))
def test_every_dtype(dtype: torch.dtype, autocast: bool) -> None:
    """One token in a hundred rows that belongs next door shows in bf16 as in fp32; what is in order passes."""

    def shifted_by(rows: int) -> Inside:
        def inside(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
            return m.linear(x.flatten(0, 1).roll(rows, 0).view_as(x))

        return inside

    for rows, size in ((0, 3), (1, 3), (0, 40), (1, 40)):
        model, (ids, seg) = Inner(shifted_by(rows)), batch(size, 100)
        if not autocast:
            model = model.to(dtype)
        with vk.SequenceGradients(model) as grads:
            with torch.autocast("cpu", dtype, enabled=autocast):
                values = scalars(model, ids, seg)
            if rows == 0:
                grads.backward(values, seg)
                assert bool(grads.squared_norms().isfinite().all())
            else:
                with pytest.raises(RuntimeError, match=MIXED):
                    grads.backward(values, seg)


def test_fp16_that_underflows_is_named() -> None:
    """Gradients of a few units of fp16's smallest number are no exact norms either."""
    model, (ids, seg) = Inner(lambda m, x, ids: m.linear(x)).half(), batch(4, 30)
    with (
        vk.SequenceGradients(model) as grads,
        pytest.raises(RuntimeError, match=r"fp16 gradients underflow: use bfloat16"),
    ):
        grads.backward(scalars(model, ids, seg) * 1e-7, seg)


FORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "less the batch's mean": lambda f: f - f.mean(),
    "in another order": lambda f: f.flip(0),
    "added up": lambda f: f.cumsum(0),
    "normalised": lambda f: f / f.std(),
    "with a loss of the batch": lambda f: f + 1e-3 * f.square().sum(),
    "of pairs": lambda f: f.view(-1, 2).sum(1).repeat_interleave(2),
    "32 further on": lambda f: f.roll(32),
}


@pytest.mark.parametrize("form", FORMED.values(), ids=FORMED)
def test_per_sequence_of_other_sequences(form: Callable[[Tensor], Tensor]) -> None:
    """per_sequence[i] that depends on j's tokens; 32 apart, where a single round's powers of two are the same."""
    model, (ids, seg) = Inner(plain), batch(64, 3)
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars(model, ids, seg), seg)
        with pytest.raises(RuntimeError, match=f"{MIXED}"):
            grads.backward(form(scalars(model, ids, seg)), seg)


def test_a_coefficient_that_begins_at_zero() -> None:
    """A loss of the whole batch that a schedule turns on: the same graph, and another answer."""
    model, (ids, seg) = Inner(plain), batch(4, 6)
    with vk.SequenceGradients(model) as grads:
        for coefficient in (0.0, 0.0, 0.01):
            f = scalars(model, ids, seg)
            f = f + coefficient * f.mean()
            if coefficient:
                with pytest.raises(RuntimeError, match=MIXED):
                    grads.backward(f, seg)
            else:
                grads.backward(f, seg)


@pytest.mark.parametrize("inside", (by_length, by_expert), ids=lambda f: f.__name__)
def test_an_order_that_data_decides_is_probed_each_time(inside: Inside) -> None:
    """The first batch comes sorted; the second does not."""
    model = Inner(inside)
    in_order = torch.arange(24).view(4, 6) // 8 + 3
    for ids, fine in ((in_order, True), (in_order.clone(), True), (batch(4, 6)[0], False)):
        seg = vk.Segments.padded(torch.ones(ids.shape))
        with vk.SequenceGradients(model) as grads:
            if fine:
                grads.backward(scalars(model, ids, seg), seg)
            else:
                with pytest.raises(RuntimeError, match=MIXED):
                    grads.backward(scalars(model, ids, seg), seg)


# --- packed rows -----------------------------------------------------------------------------------------------------

CU = (0, 4, 7, 13)


@pytest.mark.parametrize("fused", (False, True))
def test_packed_first_tokens(fused: bool) -> None:
    """shift=True predicts a sequence's first token from its neighbour: refused where it counts, exact where it does not."""
    model, ids = Inner(plain), torch.randint(1, VOCABULARY, (1, CU[-1]))
    owner = torch.repeat_interleave(torch.arange(3), torch.diff(torch.tensor(CU)))
    first_too = torch.ones(CU[-1], dtype=torch.bool)
    without = first_too.clone()
    without[list(CU[:-1])] = False
    seg = vk.Segments.packed(torch.tensor(CU))

    def of(m: Inner, mask: Tensor) -> Tensor:
        if fused:
            x = m.table(ids)
            hidden = torch.tanh(x + m.linear(x))
            logp = vk.linear_token_stats(hidden, m.head.weight, ids, m.head.bias, shift=True).logp
        else:
            logp = vk.token_stats(m(ids), ids, shift=True).logp
        return torch.zeros(3, dtype=logp.dtype).index_add(0, owner[mask], logp[0, mask])

    want = oracle(model, lambda m: of(m, without), 3)
    for mask in (without, first_too, without):
        with vk.SequenceGradients(model) as grads:
            if mask is first_too:
                with pytest.raises(RuntimeError, match=MIXED):
                    grads.backward(of(model, mask), seg)
            else:
                grads.backward(of(model, mask), seg)
                assert_norms(grads.squared_norms(), want.norms)


def test_packed_rows_that_attend_to_each_other() -> None:
    """A causal mask without blocks: the first step's mask says nothing about the second's."""
    ids = torch.randint(1, VOCABULARY, (1, CU[-1]))
    owner = torch.repeat_interleave(torch.arange(3), torch.diff(torch.tensor(CU)))
    causal = torch.ones(CU[-1], CU[-1], dtype=torch.bool).tril()
    allowed = [causal & (owner[:, None] == owner), causal]

    def attention(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
        y = m.linear(x)
        return nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=allowed[0])

    model, seg = Inner(attention), vk.Segments.packed(torch.tensor(CU))
    mask = seg.mask_without_first(CU[-1])
    masked = vk.Segments.packed(torch.tensor(CU), mask)

    def of(m: nn.Module) -> Tensor:
        return masked.sum(vk.token_stats(m(ids), ids, mask[None], shift=True).logp)

    want = oracle(model, of, 3)
    with vk.SequenceGradients(model) as grads:
        grads.backward(of(model), masked)
        assert_norms(grads.squared_norms(), want.norms)
        allowed.pop(0)
        with pytest.raises(RuntimeError, match=MIXED):
            grads.backward(of(model), masked)


def test_a_head_given_rows_in_another_order() -> None:
    """The fused head's rows are the batch's; here hidden and ids are both turned round."""
    model, (ids, seg) = Inner(plain), batch(4, 4)
    with vk.SequenceGradients(model) as grads:
        hidden = model.table(ids).flip(0)
        logp = vk.linear_token_stats(hidden, model.head.weight, ids.flip(0), model.head.bias, shift=True).logp
        with pytest.raises(RuntimeError, match=f"linear_token_stats.*{MIXED}"):
            grads.backward(seg.sum(logp.flip(0)), seg)


# --- when it runs, and what it leaves --------------------------------------------------------------------------------


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many backwards each probe ran."""
    seen: list[int] = []
    run = ownership.Probe.run_rounds

    def counted(self: ownership.Probe, *arguments: object) -> None:
        seen.append(len(self.weights))
        run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ownership.Probe, "run_rounds", counted)
    return seen


def test_it_runs_once_for_a_model(rounds: list[int]) -> None:
    """Padded batches of any width, by one SequenceGradients or several; a graph of another kind has its own."""
    model = Inner(plain)
    for length in (5, 6, 9):
        ids, seg = batch(4, length)
        with vk.SequenceGradients(model) as grads:
            grads.backward(scalars(model, ids, seg), seg)
    assert rounds == [1]
    ids, seg = batch(40, 6)
    with vk.SequenceGradients(model) as grads:
        grads.backward(2 * scalars(model, ids, seg), seg)
        grads.backward(2 * scalars(model, ids, seg), seg)
    assert rounds == [1, 2]
    with vk.SequenceGradients(Inner(plain)) as grads:
        grads.backward(scalars(grads._model, ids, seg), seg)
    assert rounds == [1, 2, 2]


def test_always_and_never(rounds: list[int]) -> None:
    model, (ids, seg) = Inner(plain), batch(4, 5)
    for _ in range(2):
        with vk.SequenceGradients(model, check="always") as grads:
            grads.backward(scalars(model, ids, seg), seg)
    assert rounds == [1, 1]
    with vk.SequenceGradients(Inner(reversed_batch), check="never") as grads:
        grads.backward(scalars(grads._model, ids, seg), seg)
    assert rounds == [1, 1]
    with pytest.raises(ValueError, match=r"check must be one of 'auto', 'always', 'never', got 'once'"):
        vk.SequenceGradients(model, check="once")


def test_a_refused_batch_is_refused_again(rounds: list[int]) -> None:
    model, (ids, seg) = Inner(reversed_batch), batch(4, 5)
    with vk.SequenceGradients(model) as grads:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=MIXED):
                grads.backward(scalars(model, ids, seg), seg)
        with pytest.raises(RuntimeError, match="no batch to work on"):
            grads.squared_norms()
    assert rounds == [1, 1]


def test_gradients_of_others_are_not_doubled() -> None:
    """A leaf outside the model (embeddings whose saliency somebody looks at) has the gradient that one backward gives."""
    model, (ids, seg) = Inner(plain), batch(4, 5)
    extra = torch.zeros(4, 5, WIDTH, requires_grad=True)
    extra.grad = torch.ones_like(extra)

    def values() -> Tensor:
        logits = model.head(torch.tanh(model.table(ids) + extra))
        return seg.sum(vk.token_stats(logits, ids, shift=True).logp)

    values().sum().backward()
    want, extra.grad = extra.grad, torch.ones_like(extra)
    model.zero_grad()
    with vk.SequenceGradients(model, check="always") as grads:
        grads.backward(values(), seg)
    torch.testing.assert_close(extra.grad, want)


def test_inplace_backward_overwrites_the_logits_last() -> None:
    """The probe's backwards leave them as they are."""
    model, (ids, seg) = Inner(plain), batch(4, 5)
    want = oracle(model, lambda m: scalars(m, ids, seg), 4)
    with vk.SequenceGradients(model, check="always") as grads:
        logits = model(ids)
        before = logits.detach().clone()
        stats = vk.token_stats(logits, ids, seg.mask.view(ids.shape), shift=True, inplace_backward=True)
        grads.backward(seg.sum(stats.logp), seg)
        assert not torch.equal(logits.detach(), before)
        assert_norms(grads.squared_norms(), want.norms)


@pytest.mark.parametrize("reentrant", (False, True))
def test_dropout_under_checkpointing(reentrant: bool) -> None:
    """Every backward sees the forward's dropout, recomputed or kept."""

    def dropped(m: Inner, x: Tensor, ids: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return nn.functional.dropout(m.linear(nn.functional.dropout(x, 0.3)), 0.3)

        return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=reentrant)

    model, (ids, seg) = Inner(dropped), batch(4, 5)

    def values() -> Tensor:
        torch.manual_seed(3)
        return scalars(model, ids, seg)

    want = []
    for i in range(4):
        model.zero_grad()
        values()[i].backward()
        want.append(sum(p.grad.double().square().sum() for p in model.parameters()))
    with vk.SequenceGradients(model, check="always") as grads:
        grads.backward(values(), seg)
        assert_norms(grads.squared_norms(), torch.stack(want))


def test_nan_in_one_sequence_is_its_own() -> None:
    """It shows in that norm, and hides no other's mixing."""
    for inside, refused in ((plain, False), (reversed_batch, True)):
        model, (ids, seg) = Inner(inside), batch(5, 5)
        with vk.SequenceGradients(model) as grads:
            values = scalars(model, ids, seg) * torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])
            if refused:
                with pytest.raises(RuntimeError, match=MIXED):
                    grads.backward(values, seg)
            else:
                grads.backward(values, seg)
                assert grads.squared_norms().isnan().tolist() == [False, True, False, False, False]
