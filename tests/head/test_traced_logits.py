"""What a model does to its logits after a patched head is done to them just so, gradients included, or is an error by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vcpo_kernels as vk

V, H = 20, 8
After = Callable[["Tiny", Any], Any]


class Tiny(nn.Module):
    """A head, and what comes after it."""

    def __init__(self, after: After, bias: bool = False, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(V, H), nn.Linear(H, V, bias=bias)
        self.head.weight.data.normal_()
        self.factor, self.entries = nn.Parameter(torch.tensor(1.7)), nn.Parameter(torch.randn(V))
        self.register_buffer("final_logits_bias", torch.randn(1, V))
        self.after, self.config = after, SimpleNamespace(**config)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.after(self, self.head(self.table(ids))))


def ids_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The ids in the leading shape that the model gave its logits."""
    ids = ids[:, -logits.shape[1] :] if logits.dim() == 3 else ids
    return ids.reshape(logits.shape[:-1])


def in_place(m: Tiny, z: Any) -> Any:
    same = z
    z *= m.factor
    z.div_(3.0)
    return same


def cap(z: Any, c: float) -> Any:
    return c * torch.tanh(z / c)


SERVED: dict[str, After] = {
    "nothing": lambda m, z: z,
    "a vocabulary cut off": lambda m, z: z[..., :15],
    "its first entries cut off": lambda m, z: z[:, :, 2:],
    "cut twice": lambda m, z: z[..., 1:18][..., :15],
    "Bart's bias": lambda m, z: z + m.final_logits_bias.to(z.device),
    "a learned bias, subtracted from the left": lambda m, z: m.entries + z,
    "a bias taken away": lambda m, z: z - m.final_logits_bias,
    "a bias after a scale, then cut": lambda m, z: (z * 0.25 + m.entries)[..., :15],
    "a learned scale": lambda m, z: z * m.factor,
    "a learned scale from the left": lambda m, z: m.factor * z,
    "division by a learned scale": lambda m, z: z / m.factor.exp(),
    "a scale, a bias, a scale": lambda m, z: ((z * m.factor) + m.entries) / m.factor,
    "in place, seen through another name": in_place,
    "a declared factor": lambda m, z: z * 0.25,
    "a division by a declared factor": lambda m, z: z / 4,
    "factors in a row": lambda m, z: z / 3.0 * 0.25,
    "a softcap": lambda m, z: cap(z, 3.0),
    "a softcap of a scale": lambda m, z: cap(z * 0.25, 3.0),
    "a scale of a softcap": lambda m, z: cap(z, 3.0) * 0.25,
    "a softcap by methods, partly in place": lambda m, z: z.div_(3.0).tanh_() * 3.0,
    "a bare tanh": lambda m, z: z.tanh(),
    "casts": lambda m, z: z.float().to(torch.float64).contiguous().clone(),
    "the last positions": lambda m, z: z[:, -3:],
    "chosen positions": lambda m, z: z[:, torch.tensor([1, 3, 5]), :],
    "flat": lambda m, z: z.view(-1, z.size(-1)),
    "flat and back": lambda m, z: z.reshape(-1, V).view(2, 6, V),
}
DECLARED = {"logit_scale": 0.25, "final_logit_softcapping": 3.0}


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("name", SERVED)
def test_served(name: str, bias: bool) -> None:
    """logp, lse and every parameter's gradient."""
    model, ids = Tiny(SERVED[name], bias, **DECLARED), torch.randint(0, 12, (2, 6))
    logits = model(ids).logits.float()
    tokens = ids_of(logits, ids)
    c = torch.randn(tokens.shape)
    want = vk.token_stats(logits.contiguous(), tokens)
    parameters = list(model.parameters())
    want_grads = torch.autograd.grad((want.logp * c).sum(), parameters, allow_unused=True)
    with vk.patch_head(model):
        out = model(ids)
    stats = out.token_stats(tokens, shift=False)
    torch.testing.assert_close(stats.logp, want.logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.lse, want.lse, atol=1e-5, rtol=1e-5)
    loss, _ = out.weighted_logp(tokens, c, shift=False)
    for value in ((stats.logp * c).sum(), loss):
        grads = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
        for got, expected in zip(grads, want_grads, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_factor_by_position() -> None:
    model, ids = Tiny(lambda m, z: z * torch.arange(1.0, 7.0)[:, None]), torch.randint(0, V, (2, 6))
    want = vk.token_stats(model(ids).logits, ids)
    with vk.patch_head(model):
        got = model(ids).token_stats(ids, shift=False)
    torch.testing.assert_close(got.logp, want.logp, atol=1e-4, rtol=1e-5)


def masked_in_place(m: Tiny, z: Any) -> Any:
    z[..., 3] = -1e9
    return z


def view_written(m: Tiny, z: Any) -> Any:
    part = z[:, :3]
    part *= 0.25
    return z


REFUSED: dict[str, tuple[After, str]] = {
    "one entry masked": (lambda m, z: z.masked_fill(torch.arange(V) == 3, -torch.inf), "masked_fill"),
    "one entry masked by where": (lambda m, z: torch.where(torch.arange(V) == 3, -1e9, z), "where of another tensor"),
    "entries written": (masked_in_place, "__setitem__"),
    "entries permuted": (lambda m, z: z[..., torch.randperm(V)], "__getitem__"),
    "entries reversed": (lambda m, z: z.flip(-1), "flip"),
    "every second entry": (lambda m, z: z[..., ::2], "__getitem__"),
    "entries scaled apart": (lambda m, z: z * m.entries, "__mul__"),
    "a bias by position": (lambda m, z: z + torch.randn(2, 6, V), "__add__"),
    "a bias after a softcap": (lambda m, z: cap(z, 3.0) + m.entries, "__add__"),
    "a softcap twice": (lambda m, z: cap(cap(z, 3.0), 3.0), "tanh"),
    "a number added": (lambda m, z: 1.0 + z, "__radd__"),
    "an unknown factor": (lambda m, z: z * 2, r"turns logits z into 2 z, .* none of the known factors \(0.25, 3"),
    "a factor of the length": (lambda m, z: z / z.shape[1], "into z / 6, .* none of the known"),
    "a sign": (lambda m, z: -z, "__neg__"),
    "log_softmax": (lambda m, z: functional.log_softmax(z, -1), "log_softmax"),
    "clamp": (lambda m, z: z.clamp(-5, 5), "clamp"),
    "top k": (lambda m, z: z.topk(5).values, "topk"),
    "dropout": (lambda m, z: functional.dropout(z, 0.1), "dropout"),
    "a matrix": (lambda m, z: z @ torch.eye(V), "__matmul__"),
    "positions apart": (lambda m, z: torch.cat([z[:, :2], z[:, 2:]], 1), "cat"),
    "other options": (lambda m, z: torch.div(z, 4.0, rounding_mode="floor"), "div"),
    "a decision by value": (lambda m, z: z if z.abs().max() > 1 else z * 0.25, "abs"),
    "a gradient cut off": (lambda m, z: z.detach(), "detach"),
    "a cast that rounds": (lambda m, z: z.bfloat16().float(), "a cast to torch.bfloat16, which rounds"),
    "another device": (lambda m, z: z.to("meta"), "applies to to its logits"),
    "by keyword": (lambda m, z: torch.mul(input=z, other=0.25), "mul"),
    "a view written in place": (view_written, "__imul__"),
    "as an operand": (lambda m, z: m.factor / z, "div of another tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    after, what = REFUSED[name]
    model = Tiny(after, **DECLARED)
    with vk.patch_head(model), pytest.raises(RuntimeError, match=f"^patch_head: Tiny .*{what}.*token_stats on"):
        model(torch.randint(0, V, (2, 6)))


def test_every_forward_is_seen() -> None:
    """Not the first alone: what a model does in evaluation, or to long inputs, is not what it does otherwise."""
    model = Tiny(lambda m, z: (z if m.training else z * 0.25)[..., : 15 if z.shape[1] > 4 else V], **DECLARED)
    with vk.patch_head(model):
        assert (
            model(torch.ones(2, 3, dtype=torch.int64)).scale,
            model.eval()(torch.ones(2, 3, dtype=torch.int64)).scale,
        ) == (1, 0.25)
        assert model(torch.ones(2, 5, dtype=torch.int64)).weight.shape == (15, H)


def test_hooks_and_a_forward_of_the_heads_own() -> None:
    """A forward hook, a pre-hook, and a forward that somebody gave this one head (TRL's head in fp32)."""
    ids = torch.randint(0, V, (2, 6))
    model = Tiny(lambda m, z: z)
    model.head.register_forward_hook(lambda module, args, out: out + 3 * model.final_logits_bias)
    model.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    weight = model.head.weight
    for forward in (None, lambda x: functional.linear(x.float(), weight.float(), None) * model.factor):
        if forward is not None:
            model.head.forward = forward
        want = vk.token_stats(model(ids).logits, ids)
        with vk.patch_head(model):
            out = model(ids)
        assert out.weight is weight
        torch.testing.assert_close(out.token_stats(ids, shift=False).logp, want.logp, atol=1e-5, rtol=1e-5)
        assert model.head.__dict__.get("forward") is forward


def test_a_head_of_two_linear_maps() -> None:
    """Their sum is one, of both inputs side by side, as with LoRA on the head; a product or a difference in the cap is none."""
    ids = torch.randint(0, V, (2, 6))
    model = Tiny(lambda m, z: z)
    weight, other = model.head.weight, torch.randn(V, H)

    def second(x: torch.Tensor, factor: float) -> torch.Tensor:
        return functional.linear(x.cos(), other) * factor

    for forward in (
        lambda x: functional.linear(x, weight) + second(x, 0.5),
        lambda x: functional.linear(x, weight) * 1.0 + second(x, -2.0) / 3 + second(x, 0.5),
    ):
        model.head.forward = forward
        want = vk.token_stats(model(ids).logits, ids).logp
        with vk.patch_head(model):
            got = model(ids).token_stats(ids, shift=False).logp
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for refused in (
        lambda x: functional.linear(x, weight) * second(x, 0.5),
        lambda x: functional.linear(x, weight) + second(x, 0.5).tanh(),
        lambda x: functional.linear(x, weight).tanh() + second(x, 0.5),
        lambda x: functional.linear(x, weight)[..., :5] + second(x, 0.5)[..., 5:10],
    ):
        model.head.forward = refused
        with vk.patch_head(model), pytest.raises(RuntimeError, match=r"Tiny applies .* to its logits"):
            model(ids)


def test_bf16_logits_made_wider_and_capped() -> None:
    model, ids = (
        Tiny(lambda m, z: cap(z.float(), 3.0).to(torch.bfloat16), **DECLARED).bfloat16(),
        torch.randint(0, V, (2, 6)),
    )
    want = vk.token_stats(model(ids).logits.float(), ids)
    with vk.patch_head(model):
        got = model(ids).token_stats(ids, shift=False)
    torch.testing.assert_close(got.logp, want.logp, atol=0.05, rtol=0.02)


def test_sequence_gradients_of_a_changed_head_are_refused() -> None:
    """Its rule is for the whole head; a bias that takes no gradient may be added."""
    ids = torch.randint(0, 12, (2, 6))
    segments = vk.Segments.padded(ids >= 0)
    for name, bias, served in (
        ("Bart's bias", False, True),
        ("Bart's bias", True, False),
        ("a vocabulary cut off", False, False),
    ):
        model = Tiny(SERVED[name], bias)
        model.factor.requires_grad_(False)
        model.entries.requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with vk.SequenceGradients(model) as gradients, vk.patch_head(model):
            if not served:
                with pytest.raises(RuntimeError, match="uses a part of its head, or adds to its bias"):
                    model(ids)
                continue
            gradients.backward(segments.sum(model(ids).token_stats(ids, shift=False).logp), segments)
            got = gradients.squared_norms()
        logp = vk.token_stats(model(ids).logits, ids).logp.sum(1)
        for i in range(2):
            want = sum(g.square().sum() for g in torch.autograd.grad(logp[i], parameters, retain_graph=True))
            torch.testing.assert_close(got[i], want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", ({}, {"find_unused_parameters": True}, {"static_graph": True}), ids=str)
@pytest.mark.parametrize("bias", (False, True))
def test_distributed_data_parallel(bias: bool, options: dict[str, bool]) -> None:
    """The head's parameters are used after the wrapped forward, which DDP takes for unused unless the output leads to them."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, ids = Tiny(lambda m, z: z + 0 * m.entries, bias), torch.randint(0, V, (2, 6))
        model.factor.requires_grad_(False)
        vk.token_stats(model(ids).logits, ids, shift=True).logp.sum().backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        for _ in range(3):
            wrapped.zero_grad()
            with vk.patch_head(model):
                wrapped(ids).token_stats(ids).logp.sum().backward()
            for name, grad in want.items():
                torch.testing.assert_close(model.get_parameter(name).grad, grad, atol=1e-5, rtol=1e-5)
    finally:
        dist.destroy_process_group()
