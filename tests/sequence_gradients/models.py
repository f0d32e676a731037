"""Models, batches and oracles of the per-sequence gradient tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vcpo_kernels as vk

VOCABULARY = 23


class TokenModel(nn.Module):
    """Every kind of module with a rule, token by token: any layout of the same tokens gives the same outputs."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8, bias=False)
        self.last = nn.RMSNorm(8)
        self.head = nn.Linear(8, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def features(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.last(x + self.down(torch.tanh(self.up(x))))  # both used twice: their cross terms count

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))


def token_model(tied: bool = False) -> TokenModel:
    torch.manual_seed(0)
    model = TokenModel(tied)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@dataclass(frozen=True)
class Oracle:
    """Per-sequence gradients in float64: squared norms [B], and the gradients by parameter, [B, *shape]."""

    norms: Tensor
    gradients: dict[str, Tensor]

    def weighted(self, coefficients: Tensor) -> dict[str, Tensor]:
        """sum_i c_i gradient_i, sequences with c_i = 0 left out."""
        live = coefficients != 0
        return {n: torch.einsum("b,b...->...", coefficients[live].double(), g[live]) for n, g in self.gradients.items()}


def oracle(model: nn.Module, scalars_of: object, count: int) -> Oracle:
    """By one autograd call per sequence, on a float64 copy. scalars_of(model) -> [B]."""
    exact = copy.deepcopy(model).double()
    named = {n: p for n, p in exact.named_parameters() if p.requires_grad}
    with vk.use_backend("reference"):
        scalars = scalars_of(exact)  # type: ignore[operator]
        rows = []
        for i in range(count):
            rows.append(torch.autograd.grad(scalars[i], list(named.values()), retain_graph=True, allow_unused=True))
    gradients = {
        name: torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows])
        for k, (name, p) in enumerate(named.items())
    }
    return Oracle(sum(g.flatten(1).square().sum(1) for g in gradients.values()), gradients)


def assert_norms(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == want.shape
    error = ((got.double() - want).abs() / want.clamp(min=1e-30)).max()
    assert error <= bound, f"squared norms: relative error {float(error):.2e}"


def assert_gradients(model: nn.Module, want: dict[str, Tensor], bound: float = 1e-5) -> None:
    """Each parameter's gradient, relative to its own norm, or to a small part of the largest one's."""
    largest = max(float(g.norm()) for g in want.values())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        expected = want[name]
        got = torch.zeros_like(expected) if parameter.grad is None else parameter.grad.double()
        error = float((got - expected).norm())
        assert error <= bound * max(float(expected.norm()), 0.1 * largest), f"{name}: {error:.2e}"
