"""Inputs of the fused head, and what its ops must give: the same through whole logits, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import vcpo_kernels as vk

FIELDS = ("logp", "entropy", "score_sqnorm", "lse")


@dataclass(frozen=True)
class HeadInputs:
    """One call's tensors. g, h: upstream gradients to logp and entropy (h None: none), with rows of zeros among them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    mask: Tensor | None
    g: Tensor
    h: Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Fresh leaves of hidden, weight and, where there is one, bias."""
        operands = (t for t in (self.hidden, self.weight, self.bias) if t is not None)
        return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in operands]


def make(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (2, 9),
    hidden: int = 19,
    vocabulary: int = 331,
    bias: bool = False,
    masked: bool = False,
    entropy: bool = False,
) -> HeadInputs:
    """Odd sizes throughout, logits of standard deviation about 3."""
    g, h = torch.randn(shape), torch.randn(shape)
    if g.dim() and g.shape[-1] > 4:
        g[..., 2:4] = h[..., 2:4] = 0
    return HeadInputs(
        hidden=torch.randn(*shape, hidden).to(dtype),
        weight=(torch.randn(vocabulary, hidden) * 3 / hidden**0.5).to(dtype),
        bias=torch.randn(vocabulary).to(dtype) if bias else None,
        token_ids=torch.randint(0, vocabulary, shape),
        mask=torch.rand(shape) < 0.6 if masked else None,
        g=g,
        h=h if entropy else None,
    )


def upstream(stats: vk.TokenStats, x: HeadInputs) -> Tensor:
    """g . logp + h . entropy, a 0-d tensor."""
    loss = (stats.logp * x.g).sum()
    return loss if x.h is None else loss + (stats.entropy * x.h).sum()


def through_logits(
    x: HeadInputs, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[vk.TokenStats, list[Tensor]]:
    """Statistics and gradients of hidden, weight (and bias) with the logits materialised in `dtype`."""
    leaves = x.leaves(dtype)
    logits = leaves[0] @ leaves[1].T + (leaves[2] if x.bias is not None else 0)
    with vk.use_backend("reference"):
        stats = vk.token_stats(logits, x.token_ids, x.mask, **options)
        return stats, list(torch.autograd.grad(upstream(stats, x), leaves))


def through_head(x: HeadInputs, **options: object) -> tuple[vk.TokenStats, list[Tensor]]:
    """The same through linear_token_stats."""
    leaves = x.leaves()
    bias = leaves[2] if x.bias is not None else None
    stats = vk.linear_token_stats(leaves[0], leaves[1], x.token_ids, bias, x.mask, **options)
    return stats, list(torch.autograd.grad(upstream(stats, x), leaves))


def distance(got: Tensor, want: Tensor) -> float:
    """Relative L2 error; absolute where nothing is wanted."""
    a, b = got.detach().double(), want.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if float(b.norm()) else float(a.norm())
