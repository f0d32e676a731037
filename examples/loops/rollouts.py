"""What the loops of this folder train on: a tiny Llama, and prompts with samples that an older version of it gave.

In a run of yours a sampler fills this, together with the log-probability of each token that it recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import vcpo_kernels as vk

VOCABULARY, PROMPT, LENGTH = 64, 4, 12  # tokens of a prompt, and of a prompt with its response
SAMPLES = 4  # per prompt

Batch = dict[str, Tensor]  # ids, mask, behavior_logp [B, T]; rewards [B]; a prompt's samples follow each other


def tiny_model() -> transformers.PreTrainedModel:
    """Two layers, the same weights at every call."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


class StalePrompts(torch.utils.data.Dataset[Batch]):
    """`count` prompts, each with SAMPLES responses; an item is a prompt with all of them, so that no shuffling parts a group.

    The reward is the share of even tokens in the response. Half of the responses end early, at a random place. of: what
    makes the model.
    """

    @torch.no_grad()
    def __init__(self, count: int, staleness: float = 0.1, of: Callable[[], Any] = tiny_model) -> None:
        sampler = of().eval()
        torch.manual_seed(1)
        for p in sampler.parameters():
            p.add_(staleness * p.std() * torch.randn_like(p))
        ids = torch.randint(VOCABULARY, (count, PROMPT)).repeat_interleave(SAMPLES, 0)
        for _ in range(LENGTH - PROMPT):
            ids = torch.cat([ids, sampler(ids).logits[:, -1].softmax(-1).multinomial(1)], 1)
        ends = torch.randint(PROMPT + 2, 2 * LENGTH, (len(ids), 1)).clamp(max=LENGTH)
        position = torch.arange(LENGTH)
        mask = (position >= PROMPT) & (position < ends)
        behavior_logp = vk.token_stats(sampler(ids).logits, ids, mask, shift=True).logp
        rewards = (mask & (ids % 2 == 0)).sum(-1) / mask.sum(-1)
        flat = {"ids": ids, "mask": mask, "behavior_logp": behavior_logp, "rewards": rewards}
        self.prompts = [{k: v[i : i + SAMPLES] for k, v in flat.items()} for i in range(0, len(ids), SAMPLES)]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> Batch:
        return self.prompts[i]


def collate(prompts: list[Batch]) -> Batch:
    """Prompts end to end: groups stay whole and consecutive."""
    return {name: torch.cat([p[name] for p in prompts]) for name in prompts[0]}
