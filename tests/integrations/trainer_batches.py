"""Batches for the trainers' losses: stale log-probabilities of padded sequences, and VCPO's own loss on them for comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import vcpo_kernels as vk


@dataclass(frozen=True)
class Batch:
    """B sequences of at most T tokens, groups of `group`. logits [B, T, V] is a leaf; ids, mask, mu [B, T]; rewards [B]."""

    logits: Tensor
    ids: Tensor
    mask: Tensor
    mu: Tensor
    rewards: Tensor
    group: int

    @property
    def segments(self) -> vk.Segments:
        return vk.Segments.padded(self.mask)

    def logp(self) -> Tensor:
        """log pi_theta [B, T], by torch alone, in a fresh graph."""
        return self.logits.log_softmax(-1).gather(-1, self.ids[..., None])[..., 0]


def batch(seed: int = 0, sequences: int = 8, length: int = 7, group: int = 4, staleness: float = 0.8) -> Batch:
    """Uneven lengths, one sequence without a token, padding that holds NaN; some w_i above 8 and some near 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sequences, length, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 11, (sequences, length), generator=generator)
    lengths = torch.randint(2, length + 1, (sequences,), generator=generator)
    lengths[-1] = 0
    mask = torch.arange(length) < lengths[:, None]
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    mu = logp + staleness * torch.randn(sequences, length, generator=generator, dtype=torch.float64)
    mu[0] -= 1.5  # w_0 far above the truncation
    mu = torch.where(mask, mu, float("nan"))
    rewards = torch.rand(sequences, generator=generator, dtype=torch.float64)
    return Batch(logits.requires_grad_(), ids, mask, mu, rewards, group)


def vcpo(b: Batch, config: vk.VCPOConfig) -> tuple[vk.VCPOOutput, Tensor]:
    """VCPO's loss on the whole batch by `vcpo_loss`, and its gradient with respect to the logits."""
    stats = vk.token_stats(b.logits, b.ids, b.mask)
    out = vk.vcpo_loss(stats, b.mu, b.rewards, b.group, b.segments, config)
    (gradient,) = torch.autograd.grad(out.loss, b.logits)
    return out, gradient


def token_advantages(b: Batch, out: vk.VCPOOutput) -> Tensor:
    """A_i at every valid token, NaN in the padding, as a trainer might leave it."""
    return torch.where(b.mask, out.advantages[:, None], float("nan"))
