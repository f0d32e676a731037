"""Batches of sequences in every layout, with logits to differentiate, for the tests of vcpo_loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.sequences.brute_force import Layout, lay_out

NAN, INF = math.nan, math.inf

VOCABULARY = 5
LENGTHS = [3, 1, 0, 2, 4, 2]
REWARDS = [1.0, 0.0, 5.0, 0.25, 1.0, -1.0]
GROUPS = torch.tensor([0, 0, 1, 1, 0, 1])


@dataclasses.dataclass
class Batch:
    """A batch of logits in some layout, with the behaviour policy's logp of each valid token."""

    layout: Layout
    logits: Tensor
    token_ids: Tensor
    behavior_logp: Tensor

    def stats(self, logits: Tensor | None = None) -> vk.TokenStats:
        # No mask: what keeps the other tokens out of the loss is the segments.
        return vk.token_stats(self.logits if logits is None else logits, self.token_ids)

    def loss(self, *args: Any, **switches: Any) -> vk.VCPOOutput:
        rewards, groups = args or (torch.tensor(REWARDS), GROUPS)
        config = vk.VCPOConfig(**switches)
        return vk.vcpo_loss(
            self.stats(),
            self.behavior_logp,
            rewards,
            groups,
            self.layout.segments,
            config,
            **self.count(groups),
        )

    def count(self, groups: Any) -> dict[str, int]:
        return {"num_groups": int(groups.max()) + 1} if isinstance(groups, Tensor) and groups.numel() else {}

    def gradient(self, out: vk.VCPOOutput) -> Tensor:
        (grad,) = torch.autograd.grad(out.loss, self.logits)
        return grad


def make(kind: str, lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    layout = lay_out(kind, lengths)
    logits = torch.randn(*layout.shape, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    token_ids = torch.randint(0, VOCABULARY, layout.shape, generator=generator)
    ragged = [-2 * torch.rand(n, generator=generator, dtype=torch.float64) - 0.5 for n in lengths]
    mu = layout.place([r.to(dtype) for r in ragged], fill=NAN)  # NaN where nothing was sampled
    return Batch(layout, logits, token_ids, mu)


def written_out_gradient(batch: Batch, out: vk.VCPOOutput) -> Tensor:
    """Autograd of -sum_i c_i sum_t m_t log p(y_t), with log_softmax and Python loops, c_i detached."""
    logp = torch.log_softmax(batch.logits, -1).gather(-1, batch.token_ids[..., None])[..., 0]
    loss = (
        -sum(c * values.sum() for c, values in zip(out.coefficients, batch.layout.pick(logp), strict=True))
        + 0 * logp.sum()
    )
    return torch.autograd.grad(loss, batch.logits)[0]
