"""SequenceGradients: norms and weighted gradients against one float64 autograd call per sequence, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import vcpo_kernels as vk
from tests.sequence_gradients.models import VOCABULARY, assert_gradients, assert_norms, oracle, token_model

BATCH, LENGTH = 4, 9


def padded() -> tuple[Tensor, Tensor]:
    """ids with padding_idx among them, and a mask of unequal responses."""
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    ids[:, 3] = 5  # the same id in every sequence, and twice in each: lookups add up within a sequence only
    ids[:, 6] = 5
    return ids, torch.arange(LENGTH) < torch.tensor([9, 6, 4, 9])[:, None]


def log_probs(model: nn.Module, ids: Tensor, seg: vk.Segments, mask: Tensor | None = None) -> Tensor:
    return seg.sum(vk.token_stats(model(ids), ids, mask, shift=True).logp)


@pytest.mark.parametrize("tied", (False, True))
def test_padded_batch(tied: bool) -> None:
    """All kinds of modules, each used twice or tied; LayerNorm, RMSNorm, biases, padding_idx."""
    model, (ids, mask) = token_model(tied), padded()
    seg = vk.Segments.padded(mask)
    want = oracle(model, lambda m: log_probs(m, ids, seg), BATCH)
    c = torch.tensor([0.5, -2.0, 0.0, 1.0])
    with vk.SequenceGradients(model) as grads:
        grads.backward(log_probs(model, ids, seg), seg)
        norms = grads.squared_norms()
        by_parameter = grads.squared_norms_by_parameter()
        grads.accumulate_(c)
    assert norms.dtype == torch.float32
    assert_norms(norms, want.norms)
    for name, g in want.gradients.items():
        assert_norms(by_parameter[name], g.flatten(1).square().sum(1))
    assert_gradients(model, want.weighted(-c))


def test_against_torch_func() -> None:
    """Per-sample gradients by vmap over grad, an implementation that shares nothing with ours."""
    model, (ids, mask) = token_model(), padded()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def log_prob(parameters: dict[str, Tensor], row: Tensor, live: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (row[None],))[0, :-1]
        logp = torch.log_softmax(logits, -1).gather(1, row[1:, None])[:, 0]
        return (logp * live[1:]).sum()

    per_sample = vmap(grad(log_prob), in_dims=(None, 0, 0))(parameters, ids, mask.float())
    seg = vk.Segments.padded(mask)
    with vk.SequenceGradients(model) as grads:
        grads.backward(log_probs(model, ids, seg), seg)
        assert_norms(grads.squared_norms(), sum(g.flatten(1).double().square().sum(1) for g in per_sample.values()))
        grads.accumulate_(-torch.ones(BATCH))
    assert_gradients(model, {n: g.double().sum(0) for n, g in per_sample.items()})


def test_packed_and_indexed_equal_padded() -> None:
    """The same tokens end to end with unused ones after them, in a wild order, and as one flat row."""
    model, (ids, mask) = token_model(), padded()
    lengths = mask.sum(1)
    flat = ids[mask]
    want = oracle(model, lambda m: log_probs(m, ids, vk.Segments.padded(mask)), BATCH)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tail = torch.randint(1, VOCABULARY, (3,))
    packed_ids = torch.cat([flat, tail])[None]
    packed_mask = vk.Segments.packed(cu).mask_without_first(packed_ids.numel())
    packed_mask[len(flat) :] = False
    packed = vk.Segments.packed(cu, packed_mask)
    permutation = torch.randperm(packed_ids.numel())
    owner = torch.full((packed_ids.numel(),), -1)
    owner[: len(flat)] = torch.repeat_interleave(torch.arange(BATCH), lengths)
    indexed = vk.Segments.indexed(owner[permutation], BATCH)

    def of_packed(m: nn.Module) -> Tensor:
        return packed.sum(vk.token_stats(m(packed_ids), packed_ids, packed_mask[None], shift=True).logp)

    def of_indexed(m: nn.Module) -> Tensor:
        targets = packed_ids.roll(-1)[0]
        live = packed_mask.roll(-1)
        logits = m(packed_ids[0][permutation])
        return indexed.sum(vk.token_stats(logits, targets[permutation], live[permutation]).logp)

    for scalars_of, segments in ((of_packed, packed), (of_indexed, indexed)):
        model.zero_grad()
        c = torch.randn(BATCH)
        with vk.SequenceGradients(model) as grads:
            grads.backward(scalars_of(model), segments)
            assert_norms(grads.squared_norms(), want.norms)
            grads.accumulate_(c)
        assert_gradients(model, want.weighted(-c))


HEADS = [
    {"memory": "fast"},
    {"memory": "lean"},
    {"memory": "lean", "chunk_bytes": 700},
    {"memory": "fast", "chunk_bytes": 700},
    {"memory": "auto"},
]


@pytest.mark.parametrize("entropy", (0.0, 0.3))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_fused_head(options: dict[str, object], tied: bool, entropy: float) -> None:
    """In every memory mode, with masked rows, a bias, the cross term of tied weights, and a gradient through the entropy."""
    model, (ids, mask) = token_model(tied), padded()
    seg = vk.Segments.padded(mask)

    def scalars(m: nn.Module, **options: object) -> Tensor:
        arguments = (m.features(ids), m.head.weight, ids, m.head.bias, mask)
        stats = vk.linear_token_stats(*arguments, temperature=0.8, softcap=20.0, shift=True, **options)
        return seg.sum(stats.logp) + entropy * seg.sum(stats.entropy) if entropy else seg.sum(stats.logp)

    want = oracle(model, scalars, BATCH)
    c = torch.tensor([0.5, -2.0, 0.0, 1.0])
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars(model, **options), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(c)
    assert_gradients(model, want.weighted(-c))


def test_indexed_rows_of_several_sequences() -> None:
    """Segment ids [R, T] where a row holds pieces of several sequences."""
    model = token_model()
    ids, owner = torch.randint(1, VOCABULARY, (3, 8)), torch.randint(0, BATCH, (3, 8))
    seg = vk.Segments.indexed(owner, BATCH)

    def scalars(m: nn.Module) -> Tensor:
        return seg.sum(vk.token_stats(m(ids), ids.roll(1, 1)).logp)

    want = oracle(model, scalars, BATCH)
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars(model), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(torch.ones(BATCH))
    assert_gradients(model, want.weighted(-torch.ones(BATCH)))


@pytest.mark.parametrize("batched", (False, True))
def test_position_embeddings_looked_up_once(batched: bool) -> None:
    """wpe(arange(T)) is added to every sequence: its output's gradient would be the sum over all of them."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = token_model(), nn.Embedding(LENGTH, 8)

        def forward(self, ids: Tensor) -> Tensor:
            places = torch.arange(ids.shape[1])
            x = self.tokens.table(ids) + self.places(places[None] if batched else places)
            return self.tokens.head(self.tokens.last(x))

    model, (ids, mask) = Positions(), padded()
    seg = vk.Segments.padded(mask)
    want = oracle(model, lambda m: log_probs(m, ids, seg), BATCH)
    with vk.SequenceGradients(model) as grads:
        grads.backward(log_probs(model, ids, seg), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(torch.ones(BATCH))
    assert_gradients(model, want.weighted(-torch.ones(BATCH)))


def test_fused_head_with_indexed_tokens_and_a_row_without_gradient() -> None:
    model, (ids, _) = token_model(tied=True), padded()
    flat, permutation = ids.flatten(), torch.randperm(ids.numel())
    owner = torch.arange(BATCH).repeat_interleave(LENGTH)[permutation]
    seg = vk.Segments.indexed(owner, BATCH)
    live = (torch.rand(ids.numel()) < 0.7) & (owner != 2)

    def scalars(m: nn.Module) -> Tensor:
        x = flat[permutation]
        return seg.sum(vk.linear_token_stats(m.features(x), m.head.weight, x, mask=live, memory="lean").logp)

    want = oracle(model, scalars, BATCH)
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars(model), seg)
        norms = grads.squared_norms()
        grads.accumulate_(torch.ones(BATCH))
    assert float(norms[2]) == 0
    assert_norms(norms, want.norms)
    assert_gradients(model, want.weighted(-torch.ones(BATCH)))


def test_vcpo_end_to_end_is_vcpo_loss_with_the_exact_norms() -> None:
    """The update is the gradient of the loss that takes the measured norms."""
    model, (ids, mask) = token_model(), padded()
    seg, rewards = vk.Segments.padded(mask), torch.tensor([1.0, 0.0, 0.25, 0.5])
    mu = vk.token_stats(model(ids), ids, mask, shift=True).logp.detach() + 0.2 * torch.randn(BATCH, LENGTH)
    exact = oracle(model, lambda m: log_probs(m, ids, seg), BATCH)
    config = vk.VCPOConfig(score_norm=exact.norms.float())
    vk.vcpo_loss(vk.token_stats(model(ids), ids, mask, shift=True), mu, rewards, 2, seg, config).loss.backward()
    want = {n: p.grad.double() for n, p in model.named_parameters()}
    model.zero_grad()
    with vk.SequenceGradients(model) as grads:
        stats = vk.token_stats(model(ids), ids, mask, shift=True)
        grads.backward(seg.sum(stats.logp), seg)
        out = vk.vcpo_loss(stats, mu, rewards, 2, seg, vk.VCPOConfig(score_norm=grads.squared_norms()))
        grads.accumulate_(out.coefficients)
    assert_gradients(model, want)


def test_micro_batches_add_up() -> None:
    """Two backwards before one accumulate_, and two contexts one after the other, give the whole batch's gradient."""
    model, (ids, mask) = token_model(tied=True), padded()
    want = oracle(model, lambda m: log_probs(m, ids, vk.Segments.padded(mask)), BATCH)
    c = torch.randn(BATCH)
    halves = [(ids[h], vk.Segments.padded(mask[h])) for h in (slice(0, 1), slice(1, BATCH))]
    with vk.SequenceGradients(model) as grads:
        for part, seg in halves:
            grads.backward(log_probs(model, part, seg), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(c)
    assert_gradients(model, want.weighted(-c))
    model.zero_grad()
    for (part, seg), of_part in zip(halves, c.split([1, BATCH - 1]), strict=True):
        with vk.SequenceGradients(model) as grads:
            grads.backward(log_probs(model, part, seg), seg)
            grads.accumulate_(of_part)
    assert_gradients(model, want.weighted(-c))


def test_a_coefficient_of_zero_keeps_nan_out() -> None:
    """A sequence that the loss drops may hold anything: 0 times NaN must not reach the parameters."""
    model, (ids, mask) = token_model(), padded()
    seg = vk.Segments.padded(mask)
    want = oracle(model, lambda m: log_probs(m, ids, seg), BATCH)
    c = torch.tensor([1.0, 0.0, -1.0, 0.5])
    with vk.SequenceGradients(model) as grads:
        broken = log_probs(model, ids, seg) * torch.tensor([1.0, float("nan"), 1.0, 1.0])
        grads.backward(broken, seg)
        norms = grads.squared_norms()
        grads.accumulate_(c)
    assert norms.isnan().tolist() == [False, True, False, False]
    assert_norms(norms[[0, 2, 3]], want.norms[[0, 2, 3]])
    assert_gradients(model, want.weighted(-c))


def test_all_coefficients_zero_leaves_zero_gradients() -> None:
    """As autograd does: an optimizer with momentum or weight decay must see a gradient, not None."""
    model, (ids, mask) = token_model(), padded()
    seg = vk.Segments.padded(mask)
    with vk.SequenceGradients(model) as grads:
        grads.backward(log_probs(model, ids, seg), seg)
        grads.accumulate_(torch.zeros(BATCH))
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


def test_repeats_are_bitwise_equal() -> None:
    model, (ids, mask) = token_model(tied=True), padded()
    seg, c = vk.Segments.padded(mask), torch.randn(BATCH)
    runs = []
    for _ in range(2):
        model.zero_grad()
        with vk.SequenceGradients(model) as grads:
            grads.backward(log_probs(model, ids, seg), seg)
            norms = grads.squared_norms()
            grads.accumulate_(c)
        runs.append([norms, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_frozen_parameters_have_no_part() -> None:
    model, (ids, mask) = token_model(), padded()
    for p in (model.table.weight, model.norm.bias, model.up.weight):
        p.requires_grad_(False)
    seg, c = vk.Segments.padded(mask), torch.randn(BATCH)
    want = oracle(model, lambda m: log_probs(m, ids, seg), BATCH)
    with vk.SequenceGradients(model) as grads:
        grads.backward(log_probs(model, ids, seg), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(c)
    assert_gradients(model, want.weighted(-c))


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(reentrant: bool) -> None:
    """Inputs are recomputed, not kept: what was kept without it is gone until the backward."""
    model, (ids, mask) = token_model(), padded()
    seg, c = vk.Segments.padded(mask), torch.randn(BATCH)
    want = oracle(model, lambda m: log_probs(m, ids, seg), BATCH)

    def checkpointed(ids: Tensor) -> Tensor:
        x = model.table(ids)
        rest = torch.utils.checkpoint.checkpoint(
            lambda x: model.down(torch.tanh(model.up(model.norm(x)))), x, use_reentrant=reentrant
        )
        x = x + rest
        x = x + torch.utils.checkpoint.checkpoint(
            lambda x: model.down(torch.tanh(model.up(x))), x, use_reentrant=reentrant
        )
        return model.head(model.last(x))

    with vk.SequenceGradients(model) as grads:
        grads.backward(seg.sum(vk.token_stats(checkpointed(ids), ids, shift=True).logp), seg)
        assert_norms(grads.squared_norms(), want.norms)
        grads.accumulate_(c)
    assert_gradients(model, want.weighted(-c))


@pytest.mark.cpu_only("enters the CPU's autocast")
def test_autocast_is_as_exact_as_plain_autograd_there() -> None:
    """bf16 activations, fp32 norms: no further from float64 than autograd's own bf16 gradients are."""
    model, (ids, mask) = token_model(), padded()
    seg, c = vk.Segments.padded(mask), torch.randn(BATCH)
    want = oracle(model, lambda m: log_probs(m, ids, seg), BATCH)

    def scalars() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
        return seg.sum(vk.token_stats(logits, ids, shift=True).logp)

    def distance() -> float:
        pairs = [(p.grad.double(), want.weighted(-c)[n]) for n, p in model.named_parameters()]
        return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5

    (-(scalars() * c).sum()).backward()
    plain = distance()
    plain_norms = []
    for i in range(BATCH):
        model.zero_grad()
        scalars()[i].backward()
        plain_norms.append(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None))
    plain_error = ((torch.stack(plain_norms) - want.norms).abs() / want.norms).max()
    model.zero_grad()
    with vk.SequenceGradients(model) as grads:
        grads.backward(scalars(), seg)
        norms = grads.squared_norms()
        grads.accumulate_(c)
    assert norms.dtype == torch.float32
    assert float(((norms.double() - want.norms).abs() / want.norms).max()) <= 1.5 * float(plain_error) + 1e-3
    assert distance() <= 1.5 * plain
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
