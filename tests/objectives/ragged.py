"""Batches for the objectives: ragged sequences in every layout, and each objective's loss as its paper writes it.

Nothing here is shared with the package. A loss is a function of one sequence's logp (differentiable), mu, pi_prox and
advantages, each [T_i] in float64, that returns the loss of each token; autograd differentiates it. What a paper keeps
constant is detached here, as there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.sequences.brute_force import Layout, lay_out, scale

LENGTHS = [4, 1, 0, 3, 6, 2]
ADVANTAGES = [1.0, -0.5, 3.0, -2.0, 0.75, 0.0]
VOCABULARY = 5


@dataclasses.dataclass
class Batch:
    """Logits in some layout; the behaviour's and a proximal logp, NaN wherever nothing was sampled."""

    layout: Layout
    logits: Tensor
    token_ids: Tensor
    mu: Tensor
    proximal: Tensor
    reference: Tensor
    token_advantages: Tensor
    advantages: Tensor = dataclasses.field(default_factory=lambda: torch.tensor(ADVANTAGES, dtype=torch.float64))

    @property
    def segments(self) -> vk.Segments:
        return self.layout.segments

    def stats(self) -> vk.TokenStats:
        return vk.token_stats(self.logits, self.token_ids)

    def logp(self) -> list[Tensor]:
        """By torch.log_softmax, one tensor per sequence."""
        tokens = torch.log_softmax(self.logits, -1).gather(-1, self.token_ids[..., None])[..., 0]
        return self.layout.pick(tokens)

    def entropy(self) -> list[Tensor]:
        logp = torch.log_softmax(self.logits, -1)
        return self.layout.pick(-(logp.exp() * logp).sum(-1))


def make(kind: str = "padded", lengths: list[int] = LENGTHS, spread: float = 0.5, seed: int = 0) -> Batch:
    """`spread`: the deviation of log pi/mu. The same sequences in every layout."""
    generator = torch.Generator().manual_seed(seed)

    def ragged(deviation: float) -> list[Tensor]:
        return [deviation * torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]

    layout = lay_out(kind, lengths)
    rows = [torch.randn(n, VOCABULARY, generator=generator, dtype=torch.float64) for n in lengths]
    ids = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]
    logits = torch.zeros(*layout.shape, VOCABULARY, dtype=torch.float64)
    token_ids = torch.zeros(layout.shape, dtype=torch.int64)
    for where, row, token in zip(layout.positions, rows, ids, strict=True):
        logits.view(-1, VOCABULARY)[where], token_ids.view(-1)[where] = row, token
    logp = [torch.log_softmax(row, -1).gather(-1, t[:, None])[:, 0] for row, t in zip(rows, ids, strict=True)]
    away = [ragged(spread), ragged(spread / 2), ragged(spread)]
    mu, proximal, reference = (layout.place([p - d for p, d in zip(logp, by, strict=True)]) for by in away)
    return Batch(layout, logits.requires_grad_(), token_ids, mu, proximal, reference, layout.place(ragged(1.0)))


def aggregate(token_losses: list[Tensor], aggregation: str, max_tokens: float) -> Tensor:
    """The batch's loss from each sequence's token losses."""
    lengths = [len(values) for values in token_losses]
    sequences, tokens = sum(n > 0 for n in lengths), sum(lengths)
    return sum(
        (scale(aggregation, len(v), sequences, tokens, max_tokens) * v.sum() for v in token_losses if len(v)),
        start=torch.zeros((), dtype=torch.float64),
    )


# --- losses, as written in the papers ---------------------------------------------------------------------------------

Loss = Callable[..., Tensor]  # (logp, mu, proximal, A, **knobs) -> token losses [T_i]


def reinforce(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor) -> Tensor:
    return -a * logp


def truncated(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, level: str, low: float, high: float) -> Tensor:
    d = logp - mu if level == "token" else (logp - mu).sum().expand_as(logp)
    return -d.exp().clamp(low, high).detach() * a * logp


def masked(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, level: str, low: float, high: float) -> Tensor:
    w = (logp - mu if level == "token" else (logp - mu).sum().expand_as(logp)).exp()
    return -(w * (w >= low) * (w <= high)).detach() * a * logp


def topr(
    logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, up: tuple[float, float], down: tuple[float, float]
) -> Tensor:
    w = (logp - mu).sum().exp()
    return -torch.where(a >= 0, w.clamp(*up), w.clamp(*down)).detach() * a * logp


def ppo(
    logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, low: float = 0.2, high: float = 0.2, dual: float | None = None
) -> Tensor:
    r = (logp - prox).exp()
    surrogate = torch.min(r * a, r.clamp(1 - low, 1 + high) * a)
    if dual is not None:
        surrogate = torch.where(a < 0, torch.max(surrogate, dual * a), surrogate)
    return -surrogate


def cispo(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -(logp - prox).exp().clamp(low, high).detach() * a * logp


def gspo(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    s = (logp - prox).mean().exp()
    return -torch.min(s * a, s.clamp(1 - low, 1 + high) * a)


def gspo_token(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    s = (logp - prox).mean().exp().detach() * (logp - logp.detach()).exp()
    return -torch.min(s * a, s.clamp(1 - low, 1 + high) * a)


def gmpo(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    d = logp - prox
    signed = a.sign() * torch.min(a.sign() * d, a.sign() * d.clamp(-low, high))
    return -signed.mean().exp() * a


def sapo(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, up: float = 1.0, down: float = 1.05) -> Tensor:
    tau = torch.where(a > 0, torch.full_like(a, up), torch.full_like(a, down))
    return -4 / tau * torch.sigmoid(tau * ((logp - prox).exp() - 1)) * a


def vespo(
    logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, up: tuple[float, float], down: tuple[float, float]
) -> Tensor:
    w = (logp - mu).sum().exp()
    k, decay = up if bool((a >= 0).all()) else down
    return -(w**k * torch.exp(decay * (1 - w))).detach() * a * logp


def icepop(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, low: float = 0.5, high: float = 5.0) -> Tensor:
    k = (prox - mu).exp().detach()
    return k * (k >= low) * (k <= high) * ppo(logp, mu, prox, a)


def opsm(logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, threshold: float) -> Tensor:
    kept = (a >= 0) | ((mu - logp.detach()).mean() <= threshold)
    return kept * ppo(logp, mu, prox, a)


def dppo_tv(
    logp: Tensor, mu: Tensor, prox: Tensor, a: Tensor, low: float = 0.2, high: float = 0.2, limit: float = 20.0
) -> Tensor:
    moved = logp.detach().exp() - mu.exp()
    kept = torch.where(a > 0, moved <= high, moved >= -low)
    return -1.0 * kept * (logp - mu).exp().clamp(max=limit).detach() * a * logp


def m2po_losses(
    logp: list[Tensor], mu: list[Tensor], a: list[Tensor], threshold: float, trust_region_only: bool
) -> list[Tensor]:
    """Algorithm 1, with a loop that takes one token at a time out of the set."""
    d = [(p - m).detach() for p, m in zip(logp, mu, strict=True)]
    remaining = {
        (i, t): float(d[i][t]) ** 2
        for i in range(len(d))
        for t in range(len(d[i]))
        if not trust_region_only or float(d[i][t]) * float(a[i][t]) > 0
    }
    left_out = set()
    while remaining and sum(remaining.values()) / len(remaining) > threshold:
        worst = max(remaining, key=lambda at: remaining[at])
        left_out.add(worst)
        del remaining[worst]
    return [
        torch.stack([-(p[t] - m[t]).exp() * adv[t] * ((i, t) not in left_out) for t in range(len(p))]) if len(p) else p
        for i, (p, m, adv) in enumerate(zip(logp, mu, a, strict=True))
    ]


@dataclasses.dataclass
class Case:
    """An entry of OBJECTIVES with knobs that make its bounds act on these batches, and the loss that it must be."""

    name: str
    loss: Loss
    knobs: dict[str, Any] = dataclasses.field(default_factory=dict)
    written: dict[str, Any] = dataclasses.field(default_factory=dict)
    proximal: bool = False
    token_advantages: bool = False


INF = math.inf
CASES = [
    Case("reinforce", reinforce, token_advantages=True),
    Case("rloo", reinforce),
    Case("token_truncated_is", truncated, {"max_weight": 1.2}, {"level": "token", "low": 0.0, "high": 1.2}),
    Case(
        "token_truncated_is", truncated, {"max_weight": 1.2, "min_weight": 0.8},
        {"level": "token", "low": 0.8, "high": 1.2}, token_advantages=True,
    ),
    Case("token_truncated_is", truncated, {"max_weight": None}, {"level": "token", "low": 0.0, "high": INF}),
    Case("sequence_truncated_is", truncated, {"max_weight": 1.5}, {"level": "sequence", "low": 0.0, "high": 1.5}),
    Case("sequence_truncated_is", truncated, {}, {"level": "sequence", "low": 0.0, "high": 8.0}),
    Case("token_masked_is", masked, {"max_weight": 1.3}, {"level": "token", "low": 0.0, "high": 1.3}),
    Case(
        "token_masked_is", masked, {"max_weight": 1.3, "min_weight": 0.8},
        {"level": "token", "low": 0.8, "high": 1.3}, token_advantages=True,
    ),
    Case(
        "sequence_masked_is", masked, {"max_weight": 1.5, "min_weight": 0.4},
        {"level": "sequence", "low": 0.4, "high": 1.5},
    ),
    Case("sequence_masked_is", masked, {"max_weight": None, "min_weight": 1.0}, {"level": "sequence", "low": 1.0, "high": INF}),
    Case("topr", topr, {}, {"up": (1.0, 1.0), "down": (0.0, 1.0)}),
    Case(
        "topr", topr, {"positive_range": (0.5, 2.0), "negative_range": (0.1, 0.7)}, {"up": (0.5, 2.0), "down": (0.1, 0.7)}
    ),
    Case("ppo", ppo),
    Case("ppo", ppo, {"clip_low": 1.5, "clip_high": 0.1}, {"low": 1.0, "high": 0.1}, token_advantages=True),
    Case("ppo_dual_clip", ppo, {"dual_clip": 1.5}, {"dual": 1.5}, proximal=True),
    Case("grpo", ppo, proximal=True),
    Case("dapo", ppo, {}, {"high": 0.28}, token_advantages=True),
    Case("dr_grpo", ppo, {"max_tokens": 7.0}),
    Case("bnpo", ppo, {"clip_low": 0.05}, {"low": 0.05}),
    Case("cispo", cispo, {"max_ratio": 1.2}, {"low": 0.0, "high": 1.2}),
    Case("cispo", cispo, {"min_ratio": 0.9, "max_ratio": 1.2}, {"low": 0.9, "high": 1.2}, proximal=True, token_advantages=True),
    Case("gspo", gspo, {"clip_low": 0.1, "clip_high": 0.1}, {"low": 0.1, "high": 0.1}),
    Case("gspo", gspo, {"aggregation": "token-mean"}, {"low": 3e-4, "high": 4e-4}, proximal=True),
    Case("gspo_token", gspo_token, {"clip_low": 0.1, "clip_high": 0.2}, {"low": 0.1, "high": 0.2}, token_advantages=True),
    Case("gmpo", gmpo, {"log_clip_low": 0.3, "log_clip_high": 0.2}, {"low": 0.3, "high": 0.2}),
    Case("gmpo", gmpo, {"aggregation": "token-mean"}, {"low": 0.4, "high": 0.4}, proximal=True),
    Case("sapo", sapo, {}, {}, token_advantages=True),
    Case("sapo", sapo, {"temperature_positive": 3.0, "temperature_negative": 0.5}, {"up": 3.0, "down": 0.5}, proximal=True),
    Case("vespo", vespo, {}, {"up": (2.0, 3.0), "down": (3.0, 2.0)}),
    Case("icepop", icepop, {"min_weight": 0.8, "max_weight": 1.3}, {"low": 0.8, "high": 1.3}, proximal=True),
    Case("opsm", opsm, {"threshold": 0.05}, {"threshold": 0.05}),
    Case("opsm", opsm, {"threshold": 0.0}, {"threshold": 0.0}, proximal=True, token_advantages=True),
    Case("dppo_tv", dppo_tv, {"divergence_low": 0.02, "divergence_high": 0.05, "max_ratio": 1.1},
         {"low": 0.02, "high": 0.05, "limit": 1.1}, token_advantages=True),
    Case("dppo_tv", dppo_tv),
]  # fmt: skip
