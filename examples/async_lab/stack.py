"""Several models of one shape, their parameters stacked in one tensor, and a sampler that decodes for all at once.

At this size most of a decoding step's time would go into calling operators: one batched product over eight models
costs hardly more calls than one over one. A run's samples do not depend on the runs beside it (but for rounding),
since every run has its own parameters, prompts and random numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import Transformer


class ParameterStack:
    """Parameters of R models of one shape: `values` and `gradients` [R, P], and views of both by name.

    optimizer_parameters: one leaf [P] a run that shares `values`, its gradient sharing `gradients`.
    """

    def __init__(self, model: Transformer, runs: int) -> None:
        named = dict(model.named_parameters())
        self.config = model.config
        self.shapes = {name: p.shape for name, p in named.items()}
        flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
        self.values = flat.repeat(runs, 1)
        self.gradients = torch.zeros_like(self.values)
        self.stacked = self._views(self.values)
        self.by_run = [self._views(row) for row in self.values]
        self.gradients_by_run = [self._views(row) for row in self.gradients]
        self.optimizer_parameters = [nn.Parameter(row) for row in self.values]
        for parameter, gradient in zip(self.optimizer_parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """flat [.., P] as one view [.., *shape] per parameter."""
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()], -1)
        lead = flat.shape[:-1]
        return {name: p.view(*lead, *shape) for (name, shape), p in zip(self.shapes.items(), parts, strict=True)}

    def __len__(self) -> int:
        return len(self.values)

    def module(self, run: int) -> Transformer:
        """A module whose parameters and gradients are those of one run, in place."""
        with torch.device("meta"):
            model = Transformer(self.config)
        shared = {name: nn.Parameter(value) for name, value in self.by_run[run].items()}
        model.load_state_dict(shared, assign=True)
        for name, parameter in model.named_parameters():
            parameter.grad = self.gradients_by_run[run][name]
        return model


class _Decoder:
    """One decoding pass of R models: a shared prompt per group of samples, then a token of each sample at a time.

    Per layer: the prompts' keys [R * G * H, D, P] and values [R * G * H, P, D], and the responses' keys and values
    [T, R * G * H, S, D], time first, so that what has been decoded so far is one piece of memory.
    """

    def __init__(self, stack: ParameterStack, groups: int, samples: int, length: int) -> None:
        config, runs = stack.config, len(stack)
        self.w, self.config = stack.stacked, config
        self.runs, self.groups, self.samples = runs, groups, samples
        self.head_width = config.width // config.heads
        self.scale = self.head_width**-0.5
        self.outer = runs * groups * config.heads
        self.own = torch.empty(config.layers, 2, length, self.outer, samples, self.head_width)
        self.shared: list[tuple[Tensor, Tensor]] = []
        self.rows = torch.arange(runs).unsqueeze(1) * config.vocabulary
        self.table = self.w["tokens.weight"].flatten(0, 1)

    def _affine(self, name: str, x: Tensor) -> Tensor:
        return torch.baddbmm(self.w[f"{name}.bias"].unsqueeze(1), x, self.w[f"{name}.weight"].transpose(1, 2))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scaled = F.layer_norm(x, x.shape[-1:])
        return torch.addcmul(self.w[f"{name}.bias"].unsqueeze(1), scaled, self.w[f"{name}.weight"].unsqueeze(1))

    def _mlp(self, block: str, x: Tensor) -> Tensor:
        return x + self._affine(
            f"{block}.down", self._affine(f"{block}.up", self._norm(f"{block}.mlp_norm", x)).relu_()
        )

    def logits(self, x: Tensor) -> Tensor:
        """[R, n, W] -> [R, n, V]."""
        return torch.bmm(self._norm("norm", x), self.w["head.weight"].transpose(1, 2))

    def prompts(self, ids: Tensor) -> Tensor:
        """Prompts [R, G, P] through all layers; the last position, [R, G, W]."""
        runs, groups, length = ids.shape
        heads, width = self.config.heads, self.config.width
        x = self.table[ids + self.rows.unsqueeze(2)] + self.w["positions.weight"][:, None, :length]
        x = x.view(runs, groups * length, width)
        for layer in range(self.config.layers):
            block = f"blocks.{layer}"
            qkv = self._affine(f"{block}.qkv", self._norm(f"{block}.attention_norm", x))
            q, k, v = qkv.view(runs * groups, length, 3, heads, self.head_width).permute(2, 0, 3, 1, 4)
            self.shared.append((k.flatten(0, 1).transpose(1, 2).contiguous(), v.flatten(0, 1).contiguous()))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            x = x + self._affine(f"{block}.project", attended.reshape(runs, groups * length, width))
            x = self._mlp(block, x)
        return x.view(runs, groups, length, width)[:, :, -1]

    def step(self, ids: Tensor, at: int, position: int) -> Tensor:
        """Token number `at` of each response, ids [R, G * S]; hidden states [R, G * S, W]."""
        runs, groups, samples, heads = self.runs, self.groups, self.samples, self.config.heads
        x = self.table[ids + self.rows] + self.w["positions.weight"][:, position : position + 1]
        for layer in range(self.config.layers):
            block = f"blocks.{layer}"
            qkv = self._affine(f"{block}.qkv", self._norm(f"{block}.attention_norm", x))
            by_head = qkv.view(runs * groups, samples, 3, heads, self.head_width).permute(2, 0, 3, 1, 4)
            q = by_head[0].reshape(self.outer, samples, self.head_width)
            self.own[layer, :, at] = by_head[1:].flatten(1, 2)
            keys, values = self.own[layer, :, : at + 1]
            shared_keys, shared_values = self.shared[layer]
            own_scores = torch.mul(keys, q).sum(-1)  # [at + 1, R * G * H, S]
            scores = torch.cat([torch.bmm(q, shared_keys), own_scores.permute(1, 2, 0)], -1)
            weights = scores.mul_(self.scale).softmax(-1)
            split = shared_keys.shape[-1]
            own = torch.mul(values, weights[..., split:].permute(2, 0, 1).unsqueeze(-1)).sum(0)
            attended = torch.baddbmm(own, weights[..., :split], shared_values)
            attended = attended.view(runs * groups, heads, samples, self.head_width).transpose(1, 2)
            x = x + self._affine(f"{block}.project", attended.reshape(runs, groups * samples, self.config.width))
            x = self._mlp(block, x)
        return x


@torch.no_grad()
def sample_stack(
    stack: ParameterStack, prompts: Tensor, uniforms: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Responses of R models, each to its own prompts.

    prompts: [R, G, P], every prompt once. uniforms: [R, G, S, T] in [0, 1), a random number for each token that is
    to be drawn (by inverting the distribution function).

    Returns the tokens and their log-probabilities under softmax(logits / temperature), both [R, G, S, T].
    """
    runs, groups, samples, length = uniforms.shape
    decoder = _Decoder(stack, groups, samples, length)
    hidden = decoder.prompts(prompts).repeat_interleave(samples, 1)
    draws = (1 - uniforms).reshape(runs, groups * samples, length)  # in (0, 1]: a token of probability 0 is never hit
    tokens = torch.empty(draws.shape, dtype=torch.int64)
    logp = torch.empty(draws.shape)
    for t in range(length):
        log_p = F.log_softmax(decoder.logits(hidden) / temperature, -1)
        cumulative = log_p.exp().cumsum_(-1)
        drawn = (cumulative < draws[..., t : t + 1] * cumulative[..., -1:]).sum(-1, keepdim=True)
        tokens[..., t] = drawn[..., 0]
        logp[..., t] = log_p.gather(-1, drawn)[..., 0]
        if t + 1 < length:
            hidden = decoder.step(drawn[..., 0], t, prompts.shape[-1] + t)
    return tokens.view(uniforms.shape), logp.view(uniforms.shape)
