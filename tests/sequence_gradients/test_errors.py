"""SequenceGradients refuses what it cannot do exactly, by name, and leaves the model as it found it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vcpo_kernels as vk
from tests.sequence_gradients.models import VOCABULARY, token_model


def batch() -> tuple[Tensor, vk.Segments]:
    return torch.randint(1, VOCABULARY, (3, 5)), vk.Segments.padded(torch.ones(3, 5))


def scalars(model: nn.Module, ids: Tensor, seg: vk.Segments) -> Tensor:
    return seg.sum(vk.token_stats(model(ids), ids, shift=True).logp)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_module_without_a_rule_is_named() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), Gate(), nn.BatchNorm1d(8), nn.Embedding(5, 2, sparse=True))
    named = r"(?s)1 \(Gate; gain\): no rule.*2 \(BatchNorm1d; weight, bias\).*3 \(Emb.*sparse"
    with pytest.raises(ValueError, match=named) as e:
        vk.SequenceGradients(model)
    assert "requires_grad_(False)" in str(e.value)
    assert "OPOBAccumulator" in str(e.value)
    for p in (*model[1].parameters(), *model[2].parameters(), *model[3].parameters()):
        p.requires_grad_(False)
    vk.SequenceGradients(model)  # frozen, they are nobody's business


def test_a_norm_by_name_alone_is_not_believed() -> None:
    class SquaredRMSNorm(Gate):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            del self.gain

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight**2

    with pytest.raises(ValueError, match=r"SquaredRMSNorm; weight\): no rule"):
        vk.SequenceGradients(nn.Sequential(nn.Linear(8, 8), SquaredRMSNorm()))


def test_a_parameter_used_outside_its_module() -> None:
    model, (ids, seg) = token_model(), batch()
    with vk.SequenceGradients(model) as grads:
        logits = model.features(ids) @ model.head.weight.T
        values = seg.sum(vk.token_stats(logits, ids, shift=True).logp)
        with pytest.raises(RuntimeError, match=r"'head.weight' takes a gradient outside"):
            grads.backward(values, seg)


def test_a_backward_of_ones_own() -> None:
    model, (ids, seg) = token_model(), batch()
    with vk.SequenceGradients(model), pytest.raises(RuntimeError, match=r"grads.backward\(per_sequence, segments\)"):
        scalars(model, ids, seg).sum().backward()


def test_segments_of_another_batch() -> None:
    model, (ids, seg) = token_model(), batch()
    with vk.SequenceGradients(model) as grads:
        values = scalars(model, ids, seg)
        with pytest.raises(
            RuntimeError, match=r"output of .* has leading dimensions \(3, 5\), but the segments have \(3, 4"
        ):
            grads.backward(values, vk.Segments.padded(torch.ones(3, 4)))
        with pytest.raises(RuntimeError, match=r"leading dimensions"):
            grads.backward(scalars(model, ids, seg), vk.Segments.packed(torch.tensor([0, 5, 10, 15])))


def test_a_head_given_a_slice() -> None:
    model, (ids, seg) = token_model(), batch()
    with vk.SequenceGradients(model) as grads:
        logp = vk.linear_token_stats(model.features(ids)[:, :-1], model.head.weight, ids[:, 1:]).logp
        with pytest.raises(
            RuntimeError, match=r"hidden states whole, with shift=True\) has leading dimensions \(3, 4\)"
        ):
            grads.backward(logp.sum(1), seg)


def test_a_shared_prefix() -> None:
    """One prefix before two responses: its gradient is the sum of both, and is not guessed at."""
    model = token_model()
    ids = torch.randint(1, VOCABULARY, (7,))
    owner = torch.tensor([-1, -1, -1, 0, 0, 1, 1])
    seg = vk.Segments.indexed(owner, 2)

    def values(live: Tensor) -> Tensor:
        logp = vk.token_stats(model(ids), ids.roll(-1), live).logp
        return torch.stack([(logp * (owner == i)).sum() + logp[2] * live[2] for i in range(2)])

    with vk.SequenceGradients(model) as grads:
        with pytest.raises(RuntimeError, match=r"belong to no sequence take a gradient.*[Pp]refix.*OPOBAccumulator"):
            grads.backward(values(torch.ones(7, dtype=torch.bool)), seg)
        grads.backward(values(owner >= 0), seg)  # no gradient reaches the prefix here (no attention): exact
        assert grads.squared_norms().shape == (2,)


def test_known_coefficients_do_not_go_with_it() -> None:
    model, (ids, _) = token_model(), batch()
    with vk.SequenceGradients(model), pytest.raises(RuntimeError, match=r"linear_weighted_logp.*linear_token_stats"):
        vk.linear_weighted_logp(model.features(ids), model.head.weight, ids, torch.ones(3, 5), shift=True)


@pytest.mark.cpu_only("graphs are the same on every device")
def test_compiled_models() -> None:
    model = token_model()
    with pytest.raises(TypeError, match=r"is compiled.*before torch.compile"):
        vk.SequenceGradients(torch.compile(model))
    model.up.compile()
    with pytest.raises(TypeError, match=r"is compiled"):
        vk.SequenceGradients(model)


def test_arguments() -> None:
    model, (ids, seg) = token_model(), batch()
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got \[\]"):
        vk.SequenceGradients([])
    with pytest.raises(ValueError, match=r"Linear has no parameter that requires a gradient"):
        vk.SequenceGradients(nn.Linear(2, 2).requires_grad_(False))
    grads = vk.SequenceGradients(model)
    with pytest.raises(RuntimeError, match=r"call it inside `with SequenceGradients"):
        grads.squared_norms()
    with grads:
        with pytest.raises(RuntimeError, match=r"squared_norms: no batch to work on"):
            grads.squared_norms()
        with pytest.raises(ValueError, match=r"per_sequence must have shape \(3,\)"):
            grads.backward(torch.zeros(2, requires_grad=True), seg)
        with pytest.raises(ValueError, match=r"per_sequence has no gradient"):
            grads.backward(torch.zeros(3), seg)
        with pytest.raises(TypeError, match=r"segments must be a Segments"):
            grads.backward(torch.zeros(3), torch.ones(3, 5))
        grads.backward(scalars(model, ids, seg), seg)
        with pytest.raises(ValueError, match=r"coefficients must have shape \(3,\)"):
            grads.accumulate_(torch.ones(2))
        with pytest.raises(RuntimeError, match=r"entered already"), grads:
            pass
        with pytest.raises(RuntimeError, match=r"another SequenceGradients of the same"), vk.SequenceGradients(model):
            pass


def test_nothing_stays_behind() -> None:
    """After the context, and after an error in a forward, parameters and hooks are the model's own, and training goes on."""
    model, (ids, seg) = token_model(), batch()
    before = dict(model.named_parameters())
    with pytest.raises(IndexError), vk.SequenceGradients(model):
        model(torch.full((1, 2), VOCABULARY + 1))
    with pytest.raises(RuntimeError), vk.SequenceGradients(model):
        model.up(torch.zeros(2, 7))
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars(model, ids, seg), seg)
    assert all(p is before[n] and p.grad is None for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(not p._backward_hooks for p in model.parameters())
    scalars(model, ids, seg).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_inside_leaves_no_trace() -> None:
    """Sampling or scoring under no_grad between two steps."""
    model, (ids, seg) = token_model(), batch()
    with vk.SequenceGradients(model) as grads:
        with torch.no_grad():
            want = model(ids)
            vk.linear_token_stats(model.features(ids), model.head.weight, ids, model.head.bias)
        assert torch.equal(model(ids).detach(), want)
        grads.backward(scalars(model, ids, seg), seg)
        assert grads.squared_norms().shape == (3,)
