"""patch_head of models that PEFT or a quantiser has changed: exact, or refused before a forward."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcpo_kernels as vk

pytest.importorskip("peft", reason="these are PEFT's adapters: pip install peft")
import peft

from tests.core.test_plain_tensors import Int8
from tests.head import tiny_models


def adapted(tied: bool = False, **options: Any) -> nn.Module:
    """LoRA on attention, with every trained number moved away from where it began."""
    model = tiny_models.make("llama, tied" if tied else "llama")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})
    wrapped: nn.Module = peft.get_peft_model(model, config)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return wrapped


def gradients(model: nn.Module, logp: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    if logp.requires_grad:
        logp.sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain LoRA": {},
    "head trained": {"modules_to_save": ["lm_head"]},
    "head and embedding trained": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens trained": {"trainable_token_indices": [3, 5]},
    "tokens trained, tied": {"trainable_token_indices": [3, 5], "tied": True},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [1, 2]}},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "rank-stabilised LoRA on the head": {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 3},
    "LoRA on a tied head": {"target_modules": ["q_proj", "lm_head"], "tied": True},
}


@pytest.mark.parametrize("enabled", (True, False))
@pytest.mark.parametrize("name", ADAPTERS)
def test_statistics_and_gradients(name: str, enabled: bool) -> None:
    """Also of the reference policy, which is the model without its adapter."""
    model, ids = adapted(**ADAPTERS[name]), torch.randint(0, tiny_models.VOCABULARY, (2, 9))
    with contextlib.nullcontext() if enabled else model.disable_adapter():
        want = vk.token_stats(model(ids).logits, ids, shift=True)
        want_grads = gradients(model, want.logp)
        with vk.patch_head(model):
            got = model(ids).token_stats(ids)
        grads = gradients(model, got.logp)
    torch.testing.assert_close(got.logp, want.logp, atol=1e-5, rtol=1e-5)
    assert grads.keys() == want_grads.keys()
    assert bool(grads) == enabled
    for key, grad in want_grads.items():
        torch.testing.assert_close(grads[key], grad, atol=1e-4, rtol=1e-4)


def test_the_adapter_is_switched_inside_the_patch() -> None:
    model, ids = adapted(modules_to_save=["lm_head"]), torch.randint(0, tiny_models.VOCABULARY, (2, 9))
    with vk.patch_head(model):
        on = model(ids).token_stats(ids).logp
        with model.disable_adapter():
            off = model(ids).token_stats(ids).logp
    with model.disable_adapter():
        torch.testing.assert_close(off, vk.token_stats(model(ids).logits, ids, shift=True).logp, atol=1e-5, rtol=1e-5)
    assert float((on - off).detach().abs().max()) > 0.1


def test_norms_by_sequence_of_a_trained_head() -> None:
    model, ids = adapted(modules_to_save=["lm_head"]), torch.randint(0, tiny_models.VOCABULARY, (2, 9))
    segments = vk.Segments.padded(ids >= 0)
    with vk.SequenceGradients(model) as of_sequences, vk.patch_head(model):
        of_sequences.backward(segments.sum(model(ids).token_stats(ids).logp), segments)
        got = of_sequences.squared_norms()
    logp = vk.token_stats(model(ids).logits, ids, shift=True).logp.sum(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    for i in range(2):
        want = sum(g.square().sum() for g in torch.autograd.grad(logp[i], trained, retain_graph=True))
        torch.testing.assert_close(got[i], want, rtol=1e-4, atol=0)


def test_two_adapters_on_the_head() -> None:
    model, ids = adapted(target_modules=["lm_head"]), torch.randint(0, tiny_models.VOCABULARY, (2, 9))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    want = vk.token_stats(model(ids).logits, ids, shift=True).logp
    want_grads = gradients(model, want)
    with vk.patch_head(model):
        got = model(ids).token_stats(ids).logp
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    grads = gradients(model, got)
    assert len(grads) == 4
    for key, grad in want_grads.items():
        torch.testing.assert_close(grads[key], grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merged", (True, False))
def test_lora_on_a_head_in_bfloat16(merged: bool) -> None:
    """Its own weights are in fp32, as PEFT keeps them; once merged there is one weight."""
    model, ids = adapted(target_modules=["lm_head"]).bfloat16(), torch.randint(0, tiny_models.VOCABULARY, (2, 9))
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data = p.data.float()
    if merged:
        model.merge_adapter()
    want = vk.token_stats(model(ids).logits, ids, shift=True).logp
    with vk.patch_head(model):
        got = model(ids).token_stats(ids).logp
    torch.testing.assert_close(got, want, atol=0.03, rtol=0.01)


@pytest.mark.parametrize("options", ({"use_dora": True}, {"lora_bias": True}), ids=("DoRA", "a bias"))
def test_other_adapters_of_the_head_are_refused_in_the_forward(options: dict[str, Any]) -> None:
    model = adapted(target_modules=["lm_head"], **options)
    with vk.patch_head(model), pytest.raises(RuntimeError, match=r"patch_head: .*(applies|bias of its own)"):
        model(torch.randint(0, tiny_models.VOCABULARY, (2, 9)))


def test_norms_by_sequence_of_lora_on_the_head_are_refused() -> None:
    model, ids = adapted(target_modules=["lm_head"]), torch.randint(0, tiny_models.VOCABULARY, (2, 9))
    with vk.SequenceGradients(model), vk.patch_head(model), pytest.raises(RuntimeError, match="no rule for that"):
        model(ids)


def test_a_quantised_head_is_refused_before_a_forward() -> None:
    model = tiny_models.make("llama")
    model.lm_head.weight = nn.Parameter(Int8(model.lm_head.weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match=r"patch_head: the head's weight is a tensor subclass, .*Int8 \(quantised"):
        vk.patch_head(model)
