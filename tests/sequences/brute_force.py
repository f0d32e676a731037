"""The design's formulas in plain Python floats, one sequence at a time: what the fast code is held against.

Nothing here is shared with the package, so that a mistake there cannot hide here. Also: `lay_out`, which puts
the same ragged sequences into each layout that `Segments` knows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

import vcpo_kernels as vk

LAYOUTS = ("padded", "packed", "packed_masked", "indexed")


@dataclass
class Layout:
    """Segments, and the flat positions of each sequence's valid tokens in a token tensor of `shape`."""

    segments: vk.Segments
    positions: list[Tensor]
    shape: tuple[int, ...]

    def place(self, ragged: list[Tensor], fill: float = math.nan) -> Tensor:
        """A token tensor that holds `ragged` at the valid positions and `fill` everywhere else."""
        dtype = ragged[0].dtype if ragged else torch.float64
        tokens = torch.full((math.prod(self.shape),), fill, dtype=dtype)
        for where, values in zip(self.positions, ragged, strict=True):
            tokens[where] = values
        return tokens.reshape(self.shape)

    def pick(self, tokens: Tensor) -> list[Tensor]:
        """The inverse of `place`."""
        return [tokens.reshape(-1)[where] for where in self.positions]


def lay_out(kind: str, lengths: list[int], seed: int = 0) -> Layout:
    """Sequences of the given lengths in one of LAYOUTS. Every layout but "packed" has masked-out tokens in
    between.
    """
    total, batch = sum(lengths), len(lengths)
    if kind == "padded":  # one masked-out (prompt) token in front, right padding behind
        width = max(lengths, default=0) + 2
        mask = torch.zeros(batch, width, dtype=torch.bool)
        for row, n in enumerate(lengths):
            mask[row, 1 : 1 + n] = True
        positions = [row * width + 1 + torch.arange(n) for row, n in enumerate(lengths)]
        return Layout(vk.Segments.padded(mask), positions, (batch, width))
    if kind == "packed":  # two tokens of padding at the end
        ends = torch.tensor([0, *lengths]).cumsum(0)
        positions = [torch.arange(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        return Layout(vk.Segments.packed(ends.int()), positions, (1, total + 2))
    if kind == "packed_masked":  # each sequence's first token masked out
        ends = torch.tensor([0, *(n + 1 for n in lengths)]).cumsum(0)
        mask = torch.ones(total + batch, dtype=torch.bool)
        mask[ends[:-1]] = False
        positions = [torch.arange(int(a) + 1, int(b)) for a, b in itertools.pairwise(ends)]
        return Layout(vk.Segments.packed(ends, mask), positions, (total + batch,))
    if kind == "indexed":  # interleaved at random, with masked-out tokens (a copy of each) and tokens of no sequence
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        ids = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64)
        ids = torch.cat([ids, ids, torch.tensor([-1, -1])])
        mask = torch.arange(ids.numel()) < total
        shuffle = torch.randperm(ids.numel(), generator=generator)
        ids, mask = ids[shuffle], mask[shuffle]
        positions = [((ids == i) & mask).nonzero().flatten() for i in range(batch)]
        return Layout(vk.Segments.indexed(ids[None], batch, mask[None]), positions, (1, ids.numel()))
    raise ValueError(kind)


def ess_ratio(log_weights: list[float]) -> tuple[float, float]:
    """ESS = (sum w)^2 / sum w^2 and ESS / B. NaN and +inf count in B and nowhere else."""
    usable = [x for x in log_weights if x < math.inf]  # False for NaN
    peak = max(usable, default=-math.inf)
    if peak == -math.inf:
        return 0.0, 0.0
    w = [math.exp(x - peak) for x in usable]  # a common factor changes nothing
    ess = math.fsum(w) ** 2 / math.fsum(x * x for x in w)
    return ess, ess / len(log_weights)


def scale(aggregation: str, length: int, num_sequences: float, num_tokens: float, max_tokens: float) -> float:
    """k_i."""
    return {
        "seq-mean-token-mean": 1 / (num_sequences * length),
        "seq-mean-token-sum": 1 / num_sequences,
        "seq-mean-token-sum-norm": 1 / (num_sequences * max_tokens),
        "token-mean": 1 / num_tokens,
    }[aggregation]


def baseline_log_weight(weighting: str, big_l: float, clipped: float, norm: float, k: float, length: int) -> float:
    """The logarithm of a sequence's share in its group's baseline."""
    log_n = math.log(norm) if norm > 0 else -math.inf
    return {
        "paper": 2 * big_l + log_n,
        "estimator": 2 * (math.log(k) + clipped) + log_n,
        "official": 2 * clipped + 2 * big_l + log_n,
        "mean": 0.0,
        "length": math.log(length),
    }[weighting]


def weighted_mean(rewards: list[float], log_a: list[float]) -> float:
    """sum a R / sum a, or the plain mean where every a is 0."""
    peak = max(log_a)
    if peak == -math.inf:
        return math.fsum(rewards) / len(rewards)
    a = [math.exp(x - peak) for x in log_a]
    return math.fsum(x * r for x, r in zip(a, rewards, strict=True)) / math.fsum(a)


def population_std(values: list[float]) -> float:
    """sqrt(mean((x - mean)^2))."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))


@dataclass
class Expected:
    """What `vcpo_loss` should return, as plain floats."""

    coefficients: list[float]
    advantages: list[float]
    baselines: list[float]
    loss: float
    metrics: dict[str, float]


def vcpo(
    log_weights: list[float],
    lengths: list[int],
    rewards: list[float],
    groups: list[int],
    norms: list[float],
    num_groups: int,
    *,
    max_weight: float | None = 8.0,
    baseline_weighting: str = "paper",
    normalize_std: bool = True,
    aggregation: str = "seq-mean-token-mean",
    num_sequences: float | None = None,
    num_tokens: float | None = None,
    max_tokens: float = 1.0,
    log_ratios: list[list[float]] | None = None,
) -> Expected:
    """The whole of VCPO, sequence by sequence. log_ratios: of each sequence's tokens, where their metrics are wanted."""
    everyone = range(len(log_weights))
    live = [i for i in everyone if lengths[i] > 0]
    part = [i for i in live if log_weights[i] < math.inf and math.isfinite(rewards[i])]
    b_count = num_sequences or max(len(live), 1)
    t_count = num_tokens or max(sum(lengths), 1)
    clip = math.inf if max_weight is None else math.log(max_weight)
    clipped = {i: min(log_weights[i], clip) for i in part}
    k = {i: scale(aggregation, lengths[i], b_count, t_count, max_tokens) for i in part}

    advantages, coefficients = [0.0] * len(log_weights), [0.0] * len(log_weights)
    baselines, equal, single = [math.nan] * num_groups, [], 0
    for g in range(num_groups):
        members = [i for i in part if groups[i] == g]
        if not members:
            continue
        r = [rewards[i] for i in members]
        log_a = [
            baseline_log_weight(baseline_weighting, log_weights[i], clipped[i], norms[i], k[i], lengths[i])
            for i in members
        ]
        baselines[g] = weighted_mean(r, log_a)
        single += len(members) == 1
        equal.append(max(r) == min(r))
        if equal[-1]:
            continue
        std = population_std(r) if normalize_std else 1.0
        for i in members:
            advantages[i] = (rewards[i] - baselines[g]) / (std if std > 1e-8 else 1.0)
            coefficients[i] = k[i] * math.exp(clipped[i]) * advantages[i]
    ess, ratio = ess_ratio([log_weights[i] if i in part else math.nan for i in live])
    n = max(len(part), 1)
    metrics = {
        "ess": ess,
        "ess_ratio": ratio,
        "num_sequences": len(live),
        "num_tokens": sum(lengths),
        "nonfinite_sequences": len(live) - len(part),
        "truncated_fraction": sum(log_weights[i] > clip for i in part) / n,
        "log_weight_mean": math.fsum(log_weights[i] for i in part) / n,
        "log_weight_max": max((log_weights[i] for i in part), default=0.0),
        "reward_mean": math.fsum(rewards[i] for i in part) / n,
        "advantage_sq_mean": math.fsum(a * a for a in advantages) / n,
        "equal_reward_fraction": sum(equal) / max(len(equal), 1),
        "single_sequence_groups": single,
    }
    if log_ratios is not None:
        finite = [d for of_sequence in log_ratios for d in of_sequence if math.isfinite(d)]
        metrics["log_ratio_abs_mean"] = math.fsum(abs(d) for d in finite) / max(len(finite), 1)
        metrics["log_ratio_negative_fraction"] = sum(d < 0 for d in finite) / max(len(finite), 1)
    loss = -math.fsum(c * n for c, n in zip(coefficients, lengths, strict=True))
    return Expected(coefficients, advantages, baselines, loss, metrics)
