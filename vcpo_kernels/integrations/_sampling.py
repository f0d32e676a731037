"""Sampler settings under which the sampled token's probability is not the policy's: over a kept set, or over changed logits.

What the sampler records is then over what it kept; the trainer's logp is over the whole vocabulary. Log-weights drift by the
missing mass of every token, and vanish together while ESS looks healthy. Each setting may only be off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Setting, as transformers, vLLM and SGLang call it -> the values that leave the distribution alone.
OFF: dict[str, tuple[Any, ...]] = {
    "top_p": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "typical_p": (1, None),
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
    "repetition_penalty": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "no_repeat_ngram_size": (0, None),
    "bad_words_ids": (None,),
    "allowed_token_ids": (None,),
    "logit_bias": (None,),
    "logits_processor": (None,),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
}

REASON = (
    "The sampler's probabilities are then over a part of the vocabulary, or over other logits, and the trainer's are not: "
    "importance weights would vanish together. Leave it off."
)


def changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these settings that are not off."""
    return {name: value for name, value in settings.items() if name in OFF and not _is_off(value, OFF[name])}


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    return any(value is allowed or (allowed is not None and value == allowed) for allowed in off)
