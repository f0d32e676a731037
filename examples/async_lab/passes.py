"""The learner's forward and backward pass, written out by hand for one model.

What autograd would do, with three savings that matter at this size: a prompt is computed once for all its samples, only
what the loss reads is computed at all, and products and gradients are written to buffers that stay in the cache.
`tests/examples` holds it against autograd through `model.Transformer`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .model import ModelConfig

EPSILON = 1e-5  # nn.LayerNorm's
Parameters = dict[str, Tensor]
_norm = torch.ops.aten.native_layer_norm
_norm_backward = torch.ops.aten.native_layer_norm_backward
_softmax_backward = torch.ops.aten._softmax_backward_data
_relu_backward = torch.ops.aten.threshold_backward.grad_input


class TrainingPass:
    """logits of every response token, and from their gradient the parameters'.

    Rows of hidden states: all positions of G prompts [G, P], then positions 0 to T - 2 of G * S responses (the last
    token predicts nothing). One object serves any number of models and steps of this shape, one after the other.
    """

    def __init__(self, config: ModelConfig, groups: int, samples: int, prompt_length: int, length: int) -> None:
        self.config = config
        self.groups, self.samples = groups, samples
        self.prompt_length, self.length = prompt_length, length
        self.own = length - 1
        self.head_width = config.width // config.heads
        self.prompt_rows = groups * prompt_length
        rows = self.prompt_rows + groups * samples * self.own
        positions = torch.arange(prompt_length + self.own)
        self.position_ids = torch.cat(
            [positions[:prompt_length].repeat(groups), positions[prompt_length:].repeat(groups * samples)]
        )
        self.causal = torch.full((self.own, self.own), -torch.inf).triu_(1)
        self.prompt_causal = torch.full((prompt_length, prompt_length), -torch.inf).triu_(1)
        self.qkv = [torch.empty(rows, 3 * config.width) for _ in range(config.layers)]
        self.hidden = [torch.empty(rows, 4 * config.width) for _ in range(config.layers)]
        self.grad_qkv = torch.empty(rows, 3 * config.width)
        self.grad_hidden = torch.empty(rows, 4 * config.width)

    # --- forward -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, w: Parameters, prompts: Tensor, responses: Tensor) -> Tensor:
        """prompts [G, P], responses [G, S, T] -> logits [G * S, T, V], a leaf that requires a gradient."""
        self.w, width = w, (self.config.width,)
        self.ids = torch.cat([prompts.reshape(-1), responses[..., :-1].reshape(-1)])
        self.kept: list[tuple[Tensor, ...]] = []
        x = w["tokens.weight"][self.ids] + w["positions.weight"][self.position_ids]
        for layer, (qkv, hidden) in enumerate(zip(self.qkv, self.hidden, strict=True)):
            b = f"blocks.{layer}"
            first = _norm(x, width, w[f"{b}.attention_norm.weight"], w[f"{b}.attention_norm.bias"], EPSILON)
            torch.addmm(w[f"{b}.qkv.bias"], first[0], w[f"{b}.qkv.weight"].t(), out=qkv)
            attention = self._attend(qkv)
            y = (x + w[f"{b}.project.bias"]).addmm_(attention[0], w[f"{b}.project.weight"].t())
            second = _norm(y, width, w[f"{b}.mlp_norm.weight"], w[f"{b}.mlp_norm.bias"], EPSILON)
            torch.addmm(w[f"{b}.up.bias"], second[0], w[f"{b}.up.weight"].t(), out=hidden).relu_()
            self.kept.append((x, y, *first, *second, *attention))
            x = (y + w[f"{b}.down.bias"]).addmm_(hidden, w[f"{b}.down.weight"].t())
        last_of_prompt = x[: self.prompt_rows].view(self.groups, 1, self.prompt_length, -1)[:, :, -1:]
        own = x[self.prompt_rows :].view(self.groups, self.samples, self.own, -1)
        self.final = torch.cat([last_of_prompt.expand(-1, self.samples, -1, -1), own], 2).flatten(0, 2)
        self.final_norm = _norm(self.final, width, w["norm.weight"], w["norm.bias"], EPSILON)
        logits = self.final_norm[0] @ w["head.weight"].t()
        return logits.view(self.groups * self.samples, self.length, -1).requires_grad_()

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """qkv as [3, G, H, P, D] of the prompts and [3, G, H, S, T - 1, D] of the responses: views."""
        heads, depth = self.config.heads, self.head_width
        prompts = qkv[: self.prompt_rows].view(self.groups, self.prompt_length, 3, heads, depth)
        own = qkv[self.prompt_rows :].view(self.groups, self.samples, self.own, 3, heads, depth)
        return prompts.permute(2, 0, 3, 1, 4), own.permute(3, 0, 4, 1, 2, 5)

    def _attend(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """What attention yields, [rows, W], and what its backward needs.

        A response's query sees its prompt, whose keys all samples share, and what came before it in the response.
        """
        outer, scale = self.groups * self.config.heads, self.head_width**-0.5
        prompts, own = (t.contiguous() for t in self._heads(qkv))
        pq, pk, pv = prompts.view(3, outer, self.prompt_length, self.head_width)
        q = own[0].view(outer, self.samples * self.own, self.head_width)
        oq, ok, ov = own.view(3, outer * self.samples, self.own, self.head_width)
        prompt_weights = torch.baddbmm(self.prompt_causal, pq, pk.transpose(1, 2), alpha=scale).softmax(-1)
        scores = torch.empty(outer * self.samples, self.own, self.prompt_length + self.own)
        to_prompt = torch.bmm(q, pk.transpose(1, 2)).view(-1, self.own, self.prompt_length)
        torch.mul(to_prompt, scale, out=scores[..., : self.prompt_length])
        scores[..., self.prompt_length :] = torch.baddbmm(self.causal, oq, ok.transpose(1, 2), alpha=scale)
        weights = scores.softmax(-1)
        on_prompt = weights[..., : self.prompt_length].reshape(outer, -1, self.prompt_length)
        on_own = weights[..., self.prompt_length :].contiguous()
        mixed = torch.bmm(on_own, ov).view(outer, -1, self.head_width).baddbmm_(on_prompt, pv)
        out = self._rows(torch.bmm(prompt_weights, pv), mixed, torch.empty(len(qkv), self.config.width))
        return out, prompts, own, prompt_weights, weights, on_prompt, on_own

    def _rows(self, prompts: Tensor, own: Tensor, out: Tensor) -> Tensor:
        """[G * H, n, D] of prompts and responses, written to rows [.., W]."""
        heads, depth = self.config.heads, self.head_width
        out[: self.prompt_rows].view(self.groups, self.prompt_length, heads, depth).copy_(
            prompts.view(self.groups, heads, self.prompt_length, depth).transpose(1, 2)
        )
        out[self.prompt_rows :].view(self.groups, -1, heads, depth).copy_(
            own.view(self.groups, heads, -1, depth).transpose(1, 2)
        )
        return out

    # --- backward ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def backward(self, grad_logits: Tensor, grads: Parameters) -> None:
        """Overwrite grads with the gradients of sum(grad_logits * logits)."""
        w = self.w
        grad = grad_logits.reshape(-1, grad_logits.shape[-1])
        torch.mm(grad.t(), self.final_norm[0], out=grads["head.weight"])
        grad = self._norm_backward("norm", grad @ w["head.weight"], self.final, self.final_norm, grads)
        by_token = grad.view(self.groups, self.samples, self.length, -1)
        x_grad = torch.zeros(len(self.ids), self.config.width)
        x_grad[: self.prompt_rows].view(self.groups, self.prompt_length, -1)[:, -1] = by_token[:, :, 0].sum(1)
        x_grad[self.prompt_rows :].view(self.groups, self.samples, self.own, -1).copy_(by_token[:, :, 1:])
        for layer in reversed(range(self.config.layers)):
            x_grad = self._block_backward(layer, x_grad, grads)
        grads["tokens.weight"].zero_().index_add_(0, self.ids, x_grad)
        grads["positions.weight"].zero_().index_add_(0, self.position_ids, x_grad)

    def _norm_backward(
        self, name: str, grad: Tensor, x: Tensor, statistics: tuple[Tensor, ...], grads: Parameters
    ) -> Tensor:
        scale, shift = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        shape, every = (self.config.width,), (True, True, True)
        out: Tensor
        out, d_scale, d_shift = _norm_backward(grad, x, shape, *statistics[1:], scale, shift, every)
        grads[f"{name}.weight"].copy_(d_scale)
        grads[f"{name}.bias"].copy_(d_shift)
        return out

    def _linear_backward(self, name: str, grad: Tensor, x: Tensor, grads: Parameters, out: Tensor | None) -> Tensor:
        torch.mm(grad.t(), x, out=grads[f"{name}.weight"])
        torch.sum(grad, 0, out=grads[f"{name}.bias"])
        weight = self.w[f"{name}.weight"]
        return grad @ weight if out is None else torch.mm(grad, weight, out=out)

    def _block_backward(self, layer: int, grad: Tensor, grads: Parameters) -> Tensor:
        b, hidden = f"blocks.{layer}", self.hidden[layer]
        x, y, *rest = self.kept[layer]
        first, second, attention = rest[:3], rest[3:6], rest[6:]
        inner = self._linear_backward(f"{b}.down", grad, hidden, grads, self.grad_hidden)
        _relu_backward(inner, hidden, 0, grad_input=inner)
        inner = self._linear_backward(f"{b}.up", inner, second[0], grads, None)
        grad = self._norm_backward(f"{b}.mlp_norm", inner, y, tuple(second), grads).add_(grad)
        inner = self._linear_backward(f"{b}.project", grad, attention[0], grads, None)
        inner = self._attention_backward(inner, *attention[1:])
        inner = self._linear_backward(f"{b}.qkv", inner, first[0], grads, None)
        return self._norm_backward(f"{b}.attention_norm", inner, x, tuple(first), grads).add_(grad)

    def _attention_backward(
        self,
        grad: Tensor,
        prompts: Tensor,
        own: Tensor,
        prompt_weights: Tensor,
        weights: Tensor,
        on_prompt: Tensor,
        on_own: Tensor,
    ) -> Tensor:
        heads, depth, split = self.config.heads, self.head_width, self.prompt_length
        outer, scale = self.groups * heads, self.head_width**-0.5
        pq, pk, pv = prompts.view(3, outer, split, depth)
        q, _, _ = own.view(3, outer, -1, depth)
        oq, ok, ov = own.view(3, -1, self.own, depth)
        by_head = grad[: self.prompt_rows].view(self.groups, split, heads, depth).transpose(1, 2)
        p_grad = by_head.reshape(outer, split, depth)
        by_head = grad[self.prompt_rows :].view(self.groups, -1, heads, depth).transpose(1, 2)
        o_grad = by_head.reshape(outer, -1, depth)
        each = o_grad.view(-1, self.own, depth)
        into_prompts, into_own = self._heads(self.grad_qkv)

        d_weights = torch.empty_like(weights)
        d_weights[..., :split] = torch.bmm(o_grad, pv.transpose(1, 2)).view(-1, self.own, split)
        d_weights[..., split:] = torch.bmm(each, ov.transpose(1, 2))
        d_scores = _softmax_backward(d_weights, weights, -1, torch.float32).mul_(scale)
        d_to_prompt = d_scores[..., :split].reshape(outer, -1, split)
        d_to_own = d_scores[..., split:].contiguous()
        dq = torch.bmm(d_to_own, ok).view(outer, -1, depth).baddbmm_(d_to_prompt, pk)
        dk, dv = torch.bmm(d_to_own.transpose(1, 2), oq), torch.bmm(on_own.transpose(1, 2), each)
        for into, part in zip(into_own, (dq, dk, dv), strict=True):
            into.copy_(part.view(into.shape))

        d_own = torch.bmm(p_grad, pv.transpose(1, 2))
        d_own = _softmax_backward(d_own, prompt_weights, -1, torch.float32).mul_(scale)
        dq = torch.bmm(d_own, pk)
        dk = torch.bmm(d_own.transpose(1, 2), pq).baddbmm_(d_to_prompt.transpose(1, 2), q)
        dv = torch.bmm(prompt_weights.transpose(1, 2), p_grad).baddbmm_(on_prompt.transpose(1, 2), o_grad)
        for into, part in zip(into_prompts, (dq, dk, dv), strict=True):
            into.copy_(part.view(into.shape))
        return self.grad_qkv
