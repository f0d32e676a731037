"""A causal LM whose ranks share sequences: the entries of its parameters (tensor parallelism), or the tokens (context
parallelism). Its parts have every rule; its attention gathers keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vcpo_kernels as vk
from tests.distributed import sharded_models as models
from tests.sequence_gradients.models import VOCABULARY, TokenModel

B, T = 8, 12


class _AllTokens(torch.autograd.Function):
    """Every rank's [B, t, ..] side by side; each rank's gradient of all of them is added up and cut again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        every = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, x.contiguous(), group=group)
        return torch.cat(every, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.length
        return whole[:, first : first + ctx.length], None


class Attention(nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for bias in (True, False, False))
        self.o, self.group = nn.Linear(8, 8), group

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        keys_at = at
        if self.group is not None:
            k, v = (_AllTokens.apply(t, self.group) for t in (k, v))
            keys_at = _AllTokens.apply(at[None], self.group)[0]
        scores = (q @ k.transpose(1, 2) / 3).masked_fill(keys_at > at[:, None], -1e9)
        return self.o(scores.softmax(-1) @ v)


class Model(TokenModel):
    """attends: whether it has the attention, which wants the tokens' places `at`."""

    def __init__(self, tied: bool, attends: bool, group: Any) -> None:
        super().__init__(tied)
        self.attention = Attention(group) if attends else None

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor, at: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import CausalLMOutput  # which FSDP2 looks into

        x = self.table(ids)
        if self.attention is not None:
            x = x + self.attention(self.norm(x), at)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return CausalLMOutput(logits=self.head(self.last(x + self.down(torch.tanh(self.up(x))))))


def made(tied: bool = False, attends: bool = False, group: Any = None) -> Model:
    torch.manual_seed(0)
    model = Model(tied, attends, group)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def batch() -> dict[str, Tensor]:
    """labels: shifted. One sequence has a single token that counts, in the first quarter."""
    torch.manual_seed(5)
    ids, mask = torch.randint(3, VOCABULARY, (B, T)), torch.rand(B, T) < 0.7
    mask[:, 2] = True
    mask[3] = False
    mask[3, 1] = True
    return {"ids": ids, "labels": ids.roll(-1, 1), "mask": mask, "c": torch.randn(B)}


@dataclass(frozen=True)
class Step:
    """head: "logits", or the memory mode of the fused one. micro_batches: of the rows that this rank has."""

    head: str = "logits"
    micro_batches: int = 1
    options: dict[str, Any] = field(default_factory=dict)  # of the fused head

    def stats(self, model: Any, ids: Tensor, labels: Tensor, mask: Tensor, *at: Tensor) -> vk.TokenStats:
        if self.head == "logits":
            out = model(ids, *at)
            return vk.token_stats(out.logits, labels, mask)
        with vk.patch_head(model):
            out = model(ids, *at)
        if self.head == "weighted_logp":
            return out.weighted_logp(labels, mask.float(), mask, shift=False)[1]  # type: ignore[no-any-return]
        return out.token_stats(labels, mask, memory=self.head, shift=False, **self.options)  # type: ignore[no-any-return]

    def run(self, model: Any, x: dict[str, Tensor], group: Any = None, *at: Tensor, factor: int = 1) -> dict[str, Any]:
        """Norms and gradients of the second of two steps, so that what the first leaves shows."""
        size = len(x["ids"]) // self.micro_batches
        for _ in range(2):
            model.zero_grad()
            with vk.SequenceGradients(model) as grads:
                for rows in (slice(i * size, (i + 1) * size) for i in range(self.micro_batches)):
                    stats = self.stats(model, *(x[name][rows] for name in ("ids", "labels", "mask")), *at)
                    segments = vk.Segments.padded(x["mask"][rows], sequence_group=group)
                    grads.backward(segments.sum(stats.logp), segments)
                norms = grads.squared_norms_by_parameter()
                grads.accumulate_(x["c"] * factor)
        return {"norms": norms, "gradients": models.gradients_of(model)}


def assert_same(got: dict[str, Any], want: dict[str, Any], bound: float, rows: slice = slice(None)) -> None:
    """Norms of all parameters together, sequence by sequence, and of each against its largest; gradients to their own norm."""
    assert got["norms"].keys() == want["norms"].keys()
    total, of_one = (sum(x["norms"].values()) for x in (got, {"norms": {n: v[rows] for n, v in want["norms"].items()}}))
    error = float(((total - of_one).abs() / of_one.clamp(min=1e-30)).max())
    assert error <= bound, f"squared norms: {error:.1e}"
    for name, norms in want["norms"].items():
        error = float((got["norms"][name] - norms[rows]).abs().max() / norms.max().clamp(min=1e-30))
        assert error <= 2 * bound, f"squared norms of {name}: {error:.1e}"
    assert_gradients(got["gradients"], want["gradients"], bound)


def assert_gradients(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == want.keys()
    largest = max(float(g.norm()) for g in want.values())
    for name, gradient in want.items():
        error = float((got[name] - gradient).norm()) / max(float(gradient.norm()), 0.1 * largest)
        assert error <= bound, f"{name}: {error:.1e}"
