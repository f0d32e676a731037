"""A small causal transformer and its batched sampler.

Pre-norm decoder with learned positions: the usual shape, at a size where a training step takes some
milliseconds on one core. The sampler keeps a key/value cache and records the log-probability of each token it
draws, at its temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelConfig:
    """vocabulary: tokens. context: longest sequence. The rest as usual; width is a multiple of heads."""

    vocabulary: int
    context: int
    layers: int = 2
    width: int = 64
    heads: int = 2


class Cache:
    """Keys and values of every layer, [batch, heads, context, head width], filled up to `length`."""

    def __init__(self, config: ModelConfig, batch: int) -> None:
        shape = (batch, config.heads, config.context, config.width // config.heads)
        self.length = 0
        self.keys = [torch.zeros(shape) for _ in range(config.layers)]
        self.values = [torch.zeros(shape) for _ in range(config.layers)]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append at `length` (which the model advances once per pass) and return everything so far."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind its norm."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.heads = index, config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        # A single query is the last position and sees every key, so only whole prompts need the mask.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.relu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Causal language model: ids [batch, T] -> logits [batch, T, vocabulary]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else 0.08)

    def forward(self, ids: Tensor, cache: Cache | None = None, keep: int | None = None) -> Tensor:
        """keep: only the last so many positions' logits, as nothing else is read; None: all."""
        start = 0 if cache is None else cache.length
        x = self.tokens(ids) + self.positions(torch.arange(start, start + ids.shape[1]))
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        logits: Tensor = self.head(self.norm(x if keep is None else x[:, -keep:]))
        return logits


@torch.no_grad()
def sample(
    model: Transformer,
    prompts: Tensor,
    length: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Continue prompts [batch, P] by `length` tokens.

    generator: draws the tokens; None decodes greedily.

    Returns the new tokens [batch, length] and their log-probabilities under softmax(logits / temperature),
    recorded as they are drawn: the behaviour policy's logp, which no later policy can recompute.
    """
    cache = Cache(model.config, prompts.shape[0])
    ids, tokens, logps = prompts, [], []
    for _ in range(length):
        log_p = F.log_softmax(model(ids, cache, keep=1)[:, 0] / temperature, dim=-1)
        greedy = generator is None
        ids = log_p.argmax(-1, True) if greedy else torch.multinomial(log_p.exp(), 1, generator=generator)
        tokens.append(ids)
        logps.append(log_p.gather(-1, ids))
    return torch.cat(tokens, 1), torch.cat(logps, 1)
