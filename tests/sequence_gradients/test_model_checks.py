"""Models, and uses of them, that would give a number which is not the gradient's, or none: refused by name; or exact."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vcpo_kernels as vk
from tests.sequence_gradients.models import VOCABULARY, assert_gradients, assert_norms, oracle, token_model

BATCH, LENGTH = 3, 5


def batch() -> tuple[Tensor, vk.Segments]:
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH)), vk.Segments.padded(torch.ones(BATCH, LENGTH))


def scalars(model: nn.Module, ids: Tensor, seg: vk.Segments) -> Tensor:
    return seg.sum(vk.token_stats(model(ids), ids, shift=True).logp)


def is_exact(model: nn.Module, scalars_of: Callable[[nn.Module], Tensor], seg: vk.Segments) -> None:
    want, c = oracle(model, scalars_of, BATCH), torch.randn(BATCH)
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars_of(model), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(c)
    assert_gradients(model, want.weighted(-c))


# --- compiled --------------------------------------------------------------------------------------------------------


def compiled_child(model: nn.Module) -> None:
    model.up = torch.compile(model.up, backend="eager")


def compiled_frozen_child(model: nn.Module) -> None:
    model.up = torch.compile(model.up.requires_grad_(False), backend="eager")


def compiled_forward(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_in_place(model: nn.Module) -> None:
    model.norm.compile(backend="eager")


@pytest.mark.cpu_only("graphs are the same on every device")
@pytest.mark.parametrize("compile_", (compiled_child, compiled_frozen_child, compiled_forward, compiled_in_place))
def test_compiled_parts(compile_: Callable[[nn.Module], None]) -> None:
    """Wherever in the model."""
    model = token_model()
    compile_(model)
    with pytest.raises(TypeError, match=r"is compiled, and a compiled graph has no modules to capture"):
        vk.SequenceGradients(model)


@pytest.mark.cpu_only("graphs are the same on every device")
@pytest.mark.parametrize("warm", (False, True))
def test_a_compiled_function_around_the_model(warm: bool) -> None:
    """Traced inside the context it runs as it is written; a graph from before, which the hooks never saw, is refused."""
    torch._dynamo.reset()
    model, (ids, seg) = token_model(), batch()
    compiled = torch.compile(lambda m, ids: m(ids), backend="aot_eager")

    def values(m: nn.Module) -> Tensor:
        return seg.sum(vk.token_stats(compiled(m, ids), ids, shift=True).logp)

    if warm:
        values(model).sum().backward()
        with (
            vk.SequenceGradients(model) as grads,
            pytest.raises(
                RuntimeError, match=r"a compiled function behind per_sequence|takes a gradient outside its own"
            ),
        ):
            grads.backward(values(model), seg)
        with (
            vk.SequenceGradients(model, check="never") as grads,
            pytest.raises(RuntimeError, match=r"takes a gradient outside its own module's forward"),
        ):
            grads.backward(values(model), seg)
    else:
        want = oracle(model, lambda m: scalars(m, ids, seg), BATCH)
        with vk.SequenceGradients(model) as grads:
            grads.backward(values(model), seg)
            assert_norms(grads.squared_norms(), want.norms)


@pytest.mark.cpu_only("graphs are the same on every device")
def test_a_compiled_function_after_the_model() -> None:
    """Its backward runs once only: the error says how to have it run twice, or how to do without."""
    torch._dynamo.reset()
    model, (ids, seg) = token_model(), batch()

    def after(logp: Tensor) -> Tensor:
        return (logp.sigmoid() * logp.exp()).sum(1)

    def values(m: nn.Module, after: Callable[[Tensor], Tensor] = after) -> Tensor:
        return after(vk.token_stats(m(ids), ids, shift=True).logp)

    want = oracle(model, values, BATCH)
    compiled = torch.compile(after, backend="aot_eager")
    with vk.SequenceGradients(model, check="never") as grads:
        grads.backward(values(model, compiled), seg)
        assert_norms(grads.squared_norms(), want.norms)
    with (
        vk.SequenceGradients(model) as grads,
        pytest.raises(RuntimeError, match=r"donated_buffer = False .*check='never'"),
    ):
        grads.backward(values(model, compiled), seg)


# --- wrapped, sharded, patched, hooked -------------------------------------------------------------------------------


def test_wrappers_inside() -> None:
    model = nn.Sequential(nn.DataParallel(token_model()))
    with pytest.raises(TypeError, match=r"0 is a DataParallel, whose reduction of gradients accumulate_ does not run"):
        vk.SequenceGradients(model)
    with pytest.raises(TypeError, match=r"the model is a DataParallel"):
        vk.SequenceGradients(model[0])

    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(TypeError, match=r"0 is sharded \(FullyShardedDataParallel\)"):
        vk.SequenceGradients(nn.Sequential(FullyShardedDataParallel(token_model())))


def test_partitioned_parameters() -> None:
    """DeepSpeed's ZeRO-3 leaves an empty tensor between a module's calls."""
    model = token_model()
    model.up.weight.ds_status = "NOT_AVAILABLE"
    with pytest.raises(TypeError, match=r"'up.weight' is sharded"):
        vk.SequenceGradients(model)


def test_a_forward_of_the_instances_own() -> None:
    """Its class says Linear, and it is something else: refused; one that computes the same, as libraries do: exact."""
    ids, seg = batch()
    for name in ("up", "table", "norm", "last"):
        model = token_model()
        module = model.get_submodule(name)
        own = module.forward
        module.forward = lambda x, own=own: own(x) * 1.01
        with pytest.raises(ValueError, match=rf"{name} \(.*weight.*\): its forward was replaced by one"):
            vk.SequenceGradients(model)
        module.forward = lambda x, own=own: (own(x), x)
        with pytest.raises(ValueError, match=r"its forward was replaced by one"):
            vk.SequenceGradients(model)
        module.forward = functools.partial(lambda own, x: own(x), own)  # accelerate's way
        want = oracle(token_model(), lambda m: scalars(m, ids, seg), BATCH)
        with vk.SequenceGradients(model) as grads:
            grads.backward(scalars(model, ids, seg), seg)
            assert_norms(grads.squared_norms(), want.norms)


def test_hooks_on_a_parameters_gradient() -> None:
    """Autograd would call them (a mask of rows that train, an optimizer in the backward); here nobody does."""
    model = token_model()
    for install in (
        lambda p: p.register_hook(lambda g: g * 0),
        lambda p: p.register_post_accumulate_grad_hook(lambda p: None),
    ):
        handle = install(model.table.weight)
        with (
            pytest.raises(RuntimeError, match=r"'table.weight' has a hook that autograd calls"),
            vk.SequenceGradients(model),
        ):
            pass
        handle.remove()
    with vk.SequenceGradients(model):
        pass


def test_hooks_on_modules_count_as_they_do_in_autograd() -> None:
    """Those that change a module's output, its output's gradient or its input's: norms of the gradient they make."""
    ids, seg = batch()

    def hooked() -> nn.Module:
        model = token_model().double()
        model.up.register_full_backward_hook(lambda m, inputs, outputs: (inputs[0] * 3,))
        model.down.register_full_backward_pre_hook(lambda m, outputs: (outputs[0] * 0.5,))
        model.norm.register_forward_hook(lambda m, args, output: output * 2)
        model.last.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        return model

    model, c = hooked(), torch.randn(BATCH, dtype=torch.float64)
    named = dict(model.named_parameters())
    values = scalars(model, ids, seg)
    rows = [torch.autograd.grad(values[i], list(named.values()), retain_graph=True) for i in range(BATCH)]
    norms = torch.stack([sum(g.square().sum() for g in row) for row in rows])
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars(model, ids, seg), seg)
        assert_norms(grads.squared_norms(), norms)
        grads.accumulate_(c)
    for k, p in enumerate(named.values()):
        torch.testing.assert_close(p.grad, -sum(c[i] * rows[i][k] for i in range(BATCH)))


def test_parameters_frozen_or_replaced_afterwards() -> None:
    model = token_model()
    grads = vk.SequenceGradients(model)
    model.up.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"frozen, unfrozen or replaced. Make a new one"), grads:
        pass
    with vk.SequenceGradients(model):
        pass
    model.up.weight.requires_grad_(True)
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"frozen, unfrozen or replaced"), grads:
        pass


def test_parameters_outside_the_model() -> None:
    """Their gradient would be the plain sum, beside a weighted one of the model's."""
    model, (ids, seg) = token_model(), batch()
    outside = nn.Linear(VOCABULARY, VOCABULARY)

    def values(*arguments: object) -> Tensor:
        return seg.sum(vk.token_stats(outside(model(ids)), ids, shift=True).logp)

    with vk.SequenceGradients(model) as grads:
        with pytest.raises(RuntimeError, match=r"parameter of shape \(23, 23\) that is not the model's"):
            grads.backward(values(), seg)
        assert outside.weight.grad is None
        outside.requires_grad_(False)
        grads.backward(values(), seg)


# --- calls that a rule does not cover --------------------------------------------------------------------------------


class AddedRMSNorm(nn.RMSNorm):
    """As fused kernels have it: the residual comes in, and both go out."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> object:
        return super().forward(x) if residual is None else (super().forward(x + residual), x + residual)


class GatedRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else super().forward(x) * torch.sigmoid(gate)


@pytest.mark.parametrize("by_name", (False, True))
@pytest.mark.parametrize("norm", (AddedRMSNorm, GatedRMSNorm))
def test_norms_of_two_arguments(norm: type[nn.Module], by_name: bool) -> None:
    """The probe of a norm shows what it does with one."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm = token_model(), norm(8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens.table(ids)
            out = self.norm(x, **{"residual" if norm is AddedRMSNorm else "gate": x}) if by_name else self.norm(x, x)
            return self.tokens.head(out[0] if isinstance(out, tuple) else out)

    model, (ids, seg) = Model(), batch()
    with (
        vk.SequenceGradients(model),
        pytest.raises(RuntimeError, match=r"norm \(\w+RMSNorm\) was called with more than its input"),
    ):
        scalars(model, ids, seg)
    assert isinstance(model.norm.weight, nn.Parameter)  # put back


def test_a_norm_that_returns_two() -> None:
    class TwoRMSNorm(nn.RMSNorm):
        returns_two = False

        def forward(self, x: Tensor) -> object:
            return (super().forward(x), x) if self.returns_two else super().forward(x)

    model = nn.Sequential(nn.Embedding(5, 8), TwoRMSNorm(8))
    with vk.SequenceGradients(model):
        model[1].returns_two = True
        with pytest.raises(RuntimeError, match=r"returned more than its output"):
            model(torch.zeros(1, 2, dtype=torch.int64))


def test_a_scaled_embedding_by_name_alone_is_not_believed() -> None:
    class OddScaledWordEmbedding(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale + self.weight.mean()

    with pytest.raises(ValueError, match=r"OddScaledWordEmbedding; weight\): no rule"):
        vk.SequenceGradients(nn.Sequential(OddScaledWordEmbedding(5, 8)))


def test_an_embedding_with_a_scale_that_its_forward_ignores() -> None:
    model, (ids, seg) = token_model(), batch()
    model.table.embed_scale = 7.0
    is_exact(model, lambda m: scalars(m, ids, seg), seg)


# --- several forwards, several backwards -----------------------------------------------------------------------------


def test_several_calls_of_the_model_before_one_backward() -> None:
    """Twice the same batch, or two batches whose values meet: each call's rows are known by themselves."""
    model, (ids, seg) = token_model(tied=True), batch()
    is_exact(model, lambda m: scalars(m, ids, seg) - 0.5 * scalars(m, ids.flip(1), seg), seg)


def test_halves_of_a_batch_before_one_backward() -> None:
    """Which half a row is in cannot be told: refused; half by half it is exact."""
    model, ids = token_model(), torch.randint(1, VOCABULARY, (4, LENGTH))
    halves, whole = vk.Segments.padded(torch.ones(2, LENGTH)), vk.Segments.padded(torch.ones(4, LENGTH))
    with vk.SequenceGradients(model) as grads:
        both = torch.cat([scalars(model, ids[:2], halves), scalars(model, ids[2:], halves)])
        with pytest.raises(RuntimeError, match="leading dimensions"):
            grads.backward(both, whole)


def test_one_graph_twice() -> None:
    """As autograd has it: an error, and the first batch stays whole."""
    model, (ids, seg) = token_model(), batch()
    with vk.SequenceGradients(model) as grads:
        values = scalars(model, ids, seg)
        grads.backward(values, seg)
        norms = grads.squared_norms()
        with pytest.raises(RuntimeError, match="second time"):
            grads.backward(values, seg)
        assert torch.equal(grads.squared_norms(), norms)


def test_activations_overwritten_in_place() -> None:
    """A ReLU over a Linear's own output."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = token_model()

        def forward(self, ids: Tensor) -> Tensor:
            t = self.tokens
            return t.head(t.last(t.down(torch.relu_(t.up(t.table(ids))))))

    model, (ids, seg) = InPlace(), batch()
    is_exact(model, lambda m: scalars(m, ids, seg), seg)


@pytest.mark.parametrize("fused", (False, True))
def test_there_is_no_second_derivative(fused: bool) -> None:
    """create_graph=True through what the context captures is an error, inside it and after it, never a graph of zeros."""
    model, (ids, seg) = token_model(), batch()

    def values(x: Tensor) -> Tensor:
        hidden = model.last(x)
        if fused:
            return seg.sum(vk.linear_token_stats(hidden, model.head.weight, ids, model.head.bias, shift=True).logp)
        return seg.sum(vk.token_stats(model.head(hidden), ids, shift=True).logp)

    x = torch.randn(BATCH, LENGTH, 8, requires_grad=True)
    with vk.SequenceGradients(model):
        kept = values(x)
        with pytest.raises(RuntimeError, match=r"no second derivative through the context \(create_graph=True\)"):
            torch.autograd.grad(values(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated by a backward of its own"):
            torch.autograd.grad(values(x).sum(), x)
    with pytest.raises(RuntimeError, match=r"no second derivative"):
        torch.autograd.grad(kept.sum(), x, create_graph=True)
