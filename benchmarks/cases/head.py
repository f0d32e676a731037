"""What the fused head's benchmark compares: our memory modes, eager torch with whole logits, and what users take instead.

Each case runs forward and backward of sum(g * logp) and returns (d hidden, d weight); weight's is None where it is
frozen. Peers give no score norm; they are called through the functions that their own trainers call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import vcpo_kernels as vk

Gradients = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class LinearInputs:
    """hidden [N, H], weight [V, H], token_ids [N], mask [N] or None, and the upstream gradient to logp [N]."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    mask: Tensor | None
    g: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


@dataclass(frozen=True)
class LinearCase:
    """One competitor. bare: the GEMMs of size N V H that it is held against. needs: a package it is made of."""

    name: str
    run: Callable[[LinearInputs], Gradients]
    bare: int
    needs: str | None = None
    masked: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        try:
            importlib.import_module(self.needs or "torch")
        except Exception as error:  # a package for another torch or device raises anything
            return f"{type(error).__name__}: {error}"
        return None


def ours(x: LinearInputs, memory: str = "auto") -> Gradients:
    hidden, weight = x.leaves()
    logp = vk.linear_token_stats(hidden, weight, x.token_ids, mask=x.mask, memory=memory).logp
    d_hidden, d_weight = torch.autograd.grad(logp, (hidden, weight), x.g)
    return d_hidden, d_weight


def ours_frozen(x: LinearInputs) -> Gradients:
    hidden = x.hidden.detach().requires_grad_()
    logp = vk.linear_token_stats(hidden, x.weight.detach(), x.token_ids).logp
    return torch.autograd.grad(logp, hidden, x.g)[0], None


def ours_weighted(x: LinearInputs) -> Gradients:
    hidden, weight = x.leaves()
    loss, _ = vk.linear_weighted_logp(hidden, weight, x.token_ids, x.g)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return d_hidden, d_weight


def _from_logp(x: LinearInputs, logp_of: Callable[[Tensor, Tensor], Tensor]) -> Gradients:
    hidden, weight = x.leaves()
    logp = logp_of(hidden, weight)
    d_hidden, d_weight = torch.autograd.grad(logp, (hidden, weight), x.g.to(logp.dtype))
    return d_hidden, d_weight


def _eager_logp(token_ids: Tensor, upcast: bool, hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return torch.log_softmax(logits.float() if upcast else logits, -1).gather(-1, token_ids[:, None])[:, 0]


def eager(x: LinearInputs, upcast: bool) -> Gradients:
    return _from_logp(x, partial(_eager_logp, x.token_ids, upcast))


_compiled_logp = torch.compile(lambda ids, hidden, weight: _eager_logp(ids, True, hidden, weight), dynamic=False)


def compiled(x: LinearInputs) -> Gradients:
    return _from_logp(x, lambda hidden, weight: _compiled_logp(x.token_ids, hidden, weight))


def trl(x: LinearInputs) -> Gradients:
    """TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`): its function, at its chunk size."""
    from trl.kernels import ChunkedLogProbFunction

    arguments = (None, x.token_ids, 1.0, 32768, None, 1.0, ())
    return _from_logp(x, lambda hidden, weight: ChunkedLogProbFunction.apply(hidden, weight, *arguments)[0])


def liger(x: LinearInputs) -> Gradients:
    """The chunked log-probabilities under Liger's fused linear GRPO and PPO losses, at their chunk size."""
    from liger_kernel.chunked_loss import fused_linear_ppo

    function = fused_linear_ppo._ChunkedSelectiveLogProbFunction
    return _from_logp(x, lambda hidden, weight: function.apply(hidden, weight, x.token_ids, None, 1.0, 4096))


def cut_cross_entropy(x: LinearInputs) -> Gradients:
    """Its kernel on a GPU; on a CPU the implementation it falls back to."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if x.hidden.is_cuda else "torch_compile"
    return _from_logp(
        x, lambda hidden, weight: -linear_cross_entropy(hidden, weight, x.token_ids, reduction="none", impl=impl)
    )


CASES = (
    LinearCase("vcpo_kernels, fast", partial(ours, memory="fast"), 3),
    LinearCase("vcpo_kernels, lean", partial(ours, memory="lean"), 4),
    LinearCase("vcpo_kernels, fast, half masked", partial(ours, memory="fast"), 3, masked=True),
    LinearCase("vcpo_kernels, lean, half masked", partial(ours, memory="lean"), 4, masked=True),
    LinearCase("vcpo_kernels, frozen weight", ours_frozen, 2),
    LinearCase("vcpo_kernels, linear_weighted_logp", ours_weighted, 3),
    LinearCase("torch eager", partial(eager, upcast=False), 3),
    LinearCase("torch eager, fp32 softmax", partial(eager, upcast=True), 3),
    LinearCase("torch.compile, fp32 softmax", compiled, 3),
    LinearCase("cut_cross_entropy", cut_cross_entropy, 3, needs="cut_cross_entropy"),
    LinearCase("TRL fused head", trl, 4, needs="trl.kernels"),
    LinearCase("Liger chunked logp", liger, 4, needs="liger_kernel.chunked_loss.fused_linear_ppo"),
)


def make_inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> LinearInputs:
    """Logits of standard deviation 3, about as peaked as a language model's; g as a mean over tokens has it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator).mul_(3 / width**0.5)
    token_ids = torch.randint(0, vocabulary, (rows,), generator=generator)
    g = torch.randn(rows, generator=generator) / rows
    return LinearInputs(hidden.to(device, dtype), weight.to(device, dtype), token_ids.to(device), None, g.to(device))


def half_masked(x: LinearInputs) -> LinearInputs:
    """Every second token left out."""
    return replace(x, mask=torch.arange(len(x.token_ids), device=x.g.device) % 2 == 0)


def oracle(x: LinearInputs, rows: int = 64) -> tuple[Tensor, Tensor]:
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


def relative_error(got: Gradients, want: tuple[Tensor, Tensor]) -> float:
    """The larger relative L2 error of the two gradients; only d hidden's where the weight is frozen."""
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


class BareGemms:
    """The GEMMs of a head alone: logits, d hidden, d weight, into memory that is already there."""

    def __init__(self, x: LinearInputs) -> None:
        self.x = x
        self.logits = torch.empty(len(x.hidden), len(x.weight), dtype=x.hidden.dtype, device=x.hidden.device)
        self.d_hidden, self.d_weight = torch.empty_like(x.hidden), torch.empty_like(x.weight)

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
