"""Tiny Hugging Face causal LMs from configurations, nothing downloaded, with logits of standard deviation about 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

# What each is here for: the common shape; biases; softcaps; a tied GPT-2 style head; scales that multiply and divide.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _SIZES),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _SIZES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _SIZES),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_SIZES, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_SIZES, "final_logit_softcapping": 3.0}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "phi": ("PhiForCausalLM", "PhiConfig", _SIZES),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_SIZES, "logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_SIZES, "logits_scaling": 4.0}),
}


def make(name: str) -> nn.Module:
    """A model in training mode without dropout, fp32."""
    return _made(*MODELS[name])


def with_experts(model_class: str, sizes: dict[str, int]) -> nn.Module:
    """A mixture of experts, computed one expert after the other, in any dtype."""
    return _made(model_class, model_class.replace("ForCausalLM", "Config"), {**_SIZES, **sizes})


def _made(model_class: str, config_class: str, sizes: dict[str, Any]) -> nn.Module:
    config = getattr(transformers, config_class)(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, model_class)(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=0.3)
        if head.bias is not None:
            head.bias.normal_()
    return model.train()
