"""Optimizers and observed batches for the tests of EssLearningRate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vcpo_kernels as vk

NAN, INF = math.nan, math.inf

# ESS 1 of 4: rho = 1/4, and the sqrt rule's factor is exactly 1/2. ESS 1 of 2.
QUARTER = torch.tensor([0.0, -1e4, -1e4, -1e4])
HALF = torch.tensor([0.0, -1e4])

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **kw: torch.optim.SGD(p, lr=0.1, **kw),
    "SGD momentum": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, **kw),
    "AdamW": lambda p, **kw: torch.optim.AdamW(p, lr=0.1, **kw),
    "AdamW foreach": lambda p, **kw: torch.optim.AdamW(p, lr=0.1, foreach=True, **kw),
    "AdamW fused": lambda p, **kw: torch.optim.AdamW(p, lr=0.1, fused=True, **kw),
    "AdamW tensor lr": lambda p, **kw: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False, **kw),
    "AdamW fused tensor lr": lambda p, **kw: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True, **kw),
    "RMSprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.1, **kw),
}


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]


def fill_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def loss_of(weight: Tensor, log_weights: Tensor) -> vk.VCPOOutput:
    """A VCPOOutput with a gradient to `weight`, whose sequences, of one token each, have the given L_i."""
    n = log_weights.numel()
    logits = weight.sum() * torch.ones(n, 1, 1) * torch.tensor([1.0, 0.0])
    stats = vk.token_stats(logits, torch.arange(n)[:, None] % 2)
    mu = stats.logp.detach() - log_weights[:, None]
    return vk.vcpo_loss(stats, mu, torch.arange(float(n)), n, vk.Segments.padded(torch.ones(n, 1)))


class Plain(torch.optim.SGD):
    """SGD with something to do before and after its step, inside of it."""

    before: Callable[[], None] = staticmethod(lambda: None)
    after: Callable[[], None] = staticmethod(lambda: None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.before()
        result = super().step(closure)
        self.after()
        return result


def lr_of(tensor: bool, value: float = 1.0) -> Any:
    return torch.tensor(value) if tensor else value


def value(rate: Any) -> float:
    return float(rate)


def put(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """As a scheduler does: into the tensor where there is one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
