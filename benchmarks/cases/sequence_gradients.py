"""A whole step of a small Llama with exact per-sequence gradient norms, plain, and one trajectory at a time.

Each case leaves the weighted gradient in the model's parameters and gives squared norms [B], or None where it has none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vcpo_kernels as vk
from benchmarks.cases.case import Case

STEP = "step"
VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 32000, 512, 1376, 4, 8
ERROR_BOUND = 2e-5  # relative, of squared norms and of the gradient, in fp32


@dataclass(frozen=True)
class Batch:
    """ids [B, T], the mask of what follows the prompt, and one coefficient per sequence as vcpo_loss gives them."""

    model: nn.Module
    ids: Tensor
    mask: Tensor
    coefficients: Tensor

    @property
    def segments(self) -> vk.Segments:
        return vk.Segments.padded(self.mask)


def make_batch(batch: int, length: int, prompt: int, device: torch.device) -> Batch:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=length,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    model = model.to(device)
    ids = torch.randint(0, VOCABULARY, (batch, length), device=device)
    mask = (torch.arange(length, device=device) >= prompt).expand(batch, length)
    return Batch(model, ids, mask, torch.randn(batch, device=device) / batch)


# --- float64 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """Squared norms [B] and the weighted gradient in float64, and the model whose gradient is held against it."""

    model: nn.Module
    norms: Tensor
    gradient: dict[str, Tensor]


def oracle(x: Batch) -> Oracle:
    """Sequence by sequence."""
    exact = copy.deepcopy(x.model).double()
    total = {n: torch.zeros_like(p) for n, p in exact.named_parameters()}
    norms = []
    for i, c in enumerate(x.coefficients.tolist()):
        exact.zero_grad()
        logp = torch.log_softmax(exact(x.ids[i : i + 1]).logits[0, :-1], -1)
        picked = logp.gather(1, x.ids[i, 1:, None])[:, 0]
        picked[x.mask[i, 1:]].sum().backward()
        gradients = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
        norms.append(_squared_norm(gradients.values()))
        for name, g in gradients.items():
            total[name].sub_(c * g)
    return Oracle(x.model, torch.stack(norms), total)


def _squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def step_error(norms: Tensor | None, want: Oracle) -> float:
    """The larger relative error of norms and gradient."""
    parameters = want.model.named_parameters()
    off = [p.grad.double() - want.gradient[n] for n, p in parameters if p.grad is not None]
    error = float((_squared_norm(off) / _squared_norm(want.gradient.values())).sqrt())
    if norms is not None:
        error = max(error, float(((norms.double() - want.norms).abs() / want.norms).max()))
    return error


# --- the ways --------------------------------------------------------------------------------------------------------


def plain(x: Batch) -> None:
    """Forward and backward of the loss with these coefficients: no norms."""
    stats = vk.token_stats(x.model(x.ids).logits, x.ids, x.mask, shift=True)
    (-(x.segments.sum(stats.logp) * x.coefficients).sum()).backward()


def plain_fused(x: Batch) -> None:
    with vk.patch_head(x.model):
        stats = x.model(x.ids).token_stats(x.ids, x.mask)
    (-(x.segments.sum(stats.logp) * x.coefficients).sum()).backward()


def ours(x: Batch) -> Tensor:
    with vk.SequenceGradients(x.model) as grads:
        stats = vk.token_stats(x.model(x.ids).logits, x.ids, x.mask, shift=True)
        return _norms_and_gradient(x, grads, stats)


def ours_fused(x: Batch) -> Tensor:
    with vk.SequenceGradients(x.model) as grads:
        with vk.patch_head(x.model):
            stats = x.model(x.ids).token_stats(x.ids, x.mask)
        return _norms_and_gradient(x, grads, stats)


def _norms_and_gradient(x: Batch, grads: vk.SequenceGradients, stats: vk.TokenStats) -> Tensor:
    grads.backward(x.segments.sum(stats.logp), x.segments)
    norms = grads.squared_norms()
    grads.accumulate_(x.coefficients)
    return norms


def one_by_one(x: Batch) -> Tensor:
    """The paper's procedure: a forward and a backward per trajectory, its gradient added to two buffers.

    With coefficients given, as the others have them: sum_i c_i grad_i, and the unweighted sum that the baseline needs.
    """
    parameters = [p for p in x.model.parameters() if p.requires_grad]
    unweighted = [torch.zeros_like(p) for p in parameters]
    norms = []
    for i, c in enumerate(x.coefficients.tolist()):
        ids, mask = x.ids[i : i + 1], x.mask[i : i + 1]
        stats = vk.token_stats(x.model(ids).logits, ids, mask, shift=True)
        gradients = torch.autograd.grad(vk.Segments.padded(mask).sum(stats.logp).sum(), parameters)
        norms.append(sum(g.square().sum() for g in gradients))
        for p, u, g in zip(parameters, unweighted, gradients, strict=True):
            u.add_(g)
            p.grad = g.mul_(-c) if p.grad is None else p.grad.add_(g, alpha=-c)
    return torch.stack([n for n in norms if isinstance(n, Tensor)])


PLAIN: Case[Batch] = Case("plain step", STEP, plain, step_error, against="plain step")
PLAIN_FUSED: Case[Batch] = Case(
    "plain step, fused head", STEP, plain_fused, step_error, against="plain step, fused head"
)
CASES: tuple[Case[Batch], ...] = (
    PLAIN,
    PLAIN_FUSED,
    Case("SequenceGradients", STEP, ours, step_error, against=PLAIN.name),
    Case("SequenceGradients, fused head", STEP, ours_fused, step_error, against=PLAIN_FUSED.name),
    Case("one trajectory at a time", STEP, one_by_one, step_error, against=PLAIN.name),
)
