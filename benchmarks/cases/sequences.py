"""What lies between the row kernel and the coefficients, and a whole VCPO loss of few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vcpo_kernels as vk
from benchmarks.cases.case import OURS, Case
from benchmarks.cases.rows import make_inputs_in_parts
from benchmarks.cases.shapes import SequenceShape, Shape
from vcpo_kernels.sequences.vcpo_coefficients import SequenceResults, vcpo_coefficients

COEFFICIENTS, COEFFICIENTS_GRAPH = "coefficients", "coefficients, CUDA graph"
LAUNCH, LAUNCH_FORWARD = "VCPO loss, launching", "VCPO loss, launching, forward alone"
GRAPH = "VCPO loss, CUDA graph"
COEFFICIENT_BOUND = 1e-4  # relative to the largest: exp(L) carries fp32 sums of T log-probabilities


@dataclass(frozen=True)
class SequenceInputs:
    """Token statistics [N] of B padded sequences without padding, and their rewards [B]."""

    logp: Tensor
    behavior_logp: Tensor
    scores: Tensor
    rewards: Tensor
    segments: vk.Segments
    group: int

    def coefficients(self, wide: bool = False) -> SequenceResults:
        """The op as vcpo_loss calls it with the paper's defaults; wide: in float64."""
        dtype = torch.float64 if wide else torch.float32
        logp, mu, scores, rewards = (t.to(dtype) for t in (self.logp, self.behavior_logp, self.scores, self.rewards))
        return vcpo_coefficients(
            logp, mu, scores, None, rewards, None, self.group, len(rewards) // self.group,
            self.segments.mask, self.segments.offsets, self.segments.order, False,
            "paper", "seq-mean-token-mean", True, 8.0, None, None, None, None,
        )  # fmt: skip


def make_sequences(shape: SequenceShape, device: torch.device) -> SequenceInputs:
    """A behaviour policy a little way off: log-weights of about one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    logp = -normal(shape.tokens).abs()
    mu = logp + normal(shape.tokens) / shape.length**0.5
    mask = torch.ones(shape.batch, shape.length, dtype=torch.bool, device=device)
    rewards = (normal(shape.batch) > 0).float()
    return SequenceInputs(logp, mu, normal(shape.tokens).abs(), rewards, vk.Segments.padded(mask), shape.group)


def oracle(x: SequenceInputs) -> Tensor:
    """The coefficients [B] in float64, by the eager reference."""
    with vk.use_backend("reference"):
        return x.coefficients(wide=True).coefficients


def coefficients_error(got: SequenceResults, want: Tensor) -> float:
    return float(((got.coefficients - want).abs().max() / want.abs().max()).item())


CASE = Case(OURS, COEFFICIENTS, SequenceInputs.coefficients, coefficients_error)


@dataclass(frozen=True)
class LossInputs:
    """Logits [B, T, V] that take a gradient, token_ids and behaviour log-probabilities [B, T], and their sequences."""

    logits: Tensor
    token_ids: Tensor
    behavior_logp: Tensor
    sequences: SequenceInputs

    def loss(self) -> Tensor:
        s = self.sequences
        stats = vk.token_stats(self.logits, self.token_ids)
        return vk.vcpo_loss(stats, self.behavior_logp, s.rewards, s.group, s.segments).loss

    def gradient(self) -> Tensor:
        return torch.autograd.grad(self.loss(), self.logits)[0]


# What launching costs says nothing of what is computed: the package's tests verify it.
LAUNCHES: dict[str, Callable[[LossInputs], Tensor]] = {LAUNCH: LossInputs.gradient, LAUNCH_FORWARD: LossInputs.loss}


def make_loss(sequences: SequenceShape, vocabulary: int, dtype: str, device: torch.device) -> LossInputs:
    x = make_inputs_in_parts(Shape(sequences.tokens, vocabulary, dtype), device)
    s = make_sequences(sequences, device)
    layout = (sequences.batch, sequences.length)
    leaf = x.logits.view(*layout, -1).requires_grad_()
    return LossInputs(leaf, x.token_ids.view(layout), s.behavior_logp.view(layout), s)
