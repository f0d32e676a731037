"""The fused head, forward and backward of sum(g * logp): inputs, our ways to do it, its bare GEMMs, and float64.

Each case gives (d hidden, d weight); weight's is None where it is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.cases.case import Case
from benchmarks.harness import verify

HEAD = "fused head, forward + backward"
# A result that is not right is not timed. bf16: what rounding the logits costs, three times over. Of ours and peers'.
ERROR_BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 5e-6}

Gradients = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class HeadInputs:
    """hidden [N, H], weight [V, H], token_ids [N], mask [N] or None, and the upstream gradient to logp [N]."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    mask: Tensor | None
    g: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


def make_inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> HeadInputs:
    """Logits of standard deviation 3, about as peaked as a language model's; g as a mean over tokens has it."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, device=device).mul_(3 / width**0.5).to(dtype)
    token_ids = torch.randint(0, vocabulary, (rows,), generator=generator, device=device)
    g = torch.randn(rows, generator=generator, device=device) / rows
    return HeadInputs(hidden, weight, token_ids, None, g)


def half_masked(x: HeadInputs) -> HeadInputs:
    """Every second token left out."""
    return replace(x, mask=torch.arange(len(x.token_ids), device=x.g.device) % 2 == 0)


# --- float64 ---------------------------------------------------------------------------------------------------------


def oracle(x: HeadInputs, rows: int = 64) -> tuple[Tensor, Tensor]:
    """d hidden and d weight in float64, a few rows at a time."""
    weight, d_hidden = x.weight.double(), torch.empty_like(x.hidden, dtype=torch.float64)
    d_weight = torch.zeros_like(weight)
    g = x.g.double() if x.mask is None else torch.where(x.mask, x.g.double(), 0.0)
    for begin in range(0, len(x.hidden), rows):
        part = slice(begin, begin + rows)
        scores = -torch.softmax(x.hidden[part].double() @ weight.T, -1)
        scores[torch.arange(len(scores)), x.token_ids[part]] += 1
        scores *= g[part, None]
        d_hidden[part] = scores @ weight
        d_weight.addmm_(scores.T, x.hidden[part].double())
    return d_hidden, d_weight


def gradients_error(got: Gradients, want: tuple[Tensor, Tensor]) -> float:
    """The larger relative L2 error of the two gradients; only d hidden's where the weight is frozen."""
    return max(verify.relative_error(a, b) for a, b in zip(got, want, strict=True) if a is not None)


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(x: HeadInputs, memory: str) -> Gradients:
    hidden, weight = x.leaves()
    logp = vk.linear_token_stats(hidden, weight, x.token_ids, mask=x.mask, memory=memory).logp
    d_hidden, d_weight = torch.autograd.grad(logp, (hidden, weight), x.g)
    return d_hidden, d_weight


def ours_frozen(x: HeadInputs) -> Gradients:
    hidden = x.hidden.detach().requires_grad_()
    logp = vk.linear_token_stats(hidden, x.weight.detach(), x.token_ids).logp
    return torch.autograd.grad(logp, hidden, x.g)[0], None


def ours_weighted(x: HeadInputs) -> Gradients:
    hidden, weight = x.leaves()
    loss, _ = vk.linear_weighted_logp(hidden, weight, x.token_ids, x.g)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return d_hidden, d_weight


FAST = Case("vcpo_kernels, fast", HEAD, partial(ours, memory="fast"), gradients_error, op="score_rows", gemms=3)
LEAN = Case("vcpo_kernels, lean", HEAD, partial(ours, memory="lean"), gradients_error, op="score_rows", gemms=4)
CASES = (
    FAST,
    LEAN,
    *(replace(case, name=f"{case.name}, half masked", masked=True) for case in (FAST, LEAN)),
    Case("vcpo_kernels, frozen weight", HEAD, ours_frozen, gradients_error, gemms=2),
    Case("vcpo_kernels, linear_weighted_logp", HEAD, ours_weighted, gradients_error, gemms=3),
)


# --- what no head can do without -------------------------------------------------------------------------------------


class BareGemms:
    """The GEMMs of a head alone: logits, d hidden, d weight, into memory that is already there."""

    def __init__(self, x: HeadInputs) -> None:
        self.x = x
        self.logits = torch.empty(len(x.hidden), len(x.weight), dtype=x.hidden.dtype, device=x.hidden.device)
        self.d_hidden, self.d_weight = torch.empty_like(x.hidden), torch.empty_like(x.weight)

    @staticmethod
    def name(gemms: int) -> str:
        return f"{gemms} bare GEMMs"

    def forward(self) -> None:
        torch.mm(self.x.hidden, self.x.weight.T, out=self.logits)

    def run(self, gemms: int) -> None:
        """2: forward and d hidden; 3: d weight too; 4: and the forward again."""
        self.forward()
        torch.mm(self.logits, self.x.weight, out=self.d_hidden)
        if gemms >= 3:
            torch.mm(self.logits.T, self.x.hidden, out=self.d_weight)
        if gemms >= 4:
            self.forward()
