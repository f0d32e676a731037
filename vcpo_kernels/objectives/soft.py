"""Objectives that taper the ratio smoothly instead of clipping it: SAPO by token, VESPO by sequence.

Layer: tokens [N]. Both gradients fall to 0 as the ratio grows, so neither overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.nn.functional import logsigmoid

from vcpo_kernels.core.checks import Check
from vcpo_kernels.objectives.build import TokenTerms
from vcpo_kernels.objectives.token_objective import TokenObjective
from vcpo_kernels.objectives.tokens import TokenBatch, by_flag, require_sequence_advantages, times
from vcpo_kernels.sequences.log_weights import UNTRUNCATED_LIMIT


@dataclass(frozen=True, kw_only=True)
class SAPO(TokenObjective):
    """SAPO: a sigmoid gate in place of the clip.

    Token objective f(r) A with f(r) = (4/tau) sigmoid(tau (r - 1)), tau by the sign of A (arXiv 2511.20347; TRL's and verl's
    "sapo"). Gradient 4 p (1 - p) r A grad logp, p = sigmoid(tau (r - 1)): that of r A at r = 1, fading on both sides.

    Hyperparameters:
        temperature_positive, temperature_negative: tau for A > 0 and for A <= 0, > 0; the larger, the faster the fading.

    Metrics: gate_mean, of 4 p (1 - p).

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 2.0]])
    >>> objectives.sapo(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 0.0247]])
    """

    name: ClassVar[str] = "sapo"

    temperature_positive: float = 1.0
    temperature_negative: float = 1.05

    def checked(self, check: Check) -> dict[str, Any]:
        return self.each(check.positive_float, "temperature_positive", "temperature_negative")

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        log_r = tokens.log_ratio.clamp(max=UNTRUNCATED_LIMIT)  # both factors of the gradient stay finite; it is 0 there
        tau = by_flag(tokens.advantages > 0, self.temperature_positive, self.temperature_negative, log_r)
        z = tau * (log_r.exp() - 1)
        log_gate = math.log(4) + logsigmoid(z) + logsigmoid(-z)
        values = times(4 / tau * z.sigmoid(), tokens.advantages)
        return TokenTerms(times((log_gate + log_r).exp(), tokens.advantages), values, {"gate_mean": log_gate.exp()})


@dataclass(frozen=True, kw_only=True)
class VESPO(TokenObjective):
    """VESPO: a gamma-shaped kernel of the sequence weight as a constant before log pi.

    Token objective sg[phi(w)] A log pi with phi(w) = w^k exp(lambda (1 - w)), phi(1) = 1, w = pi(y)/mu(y) over the whole
    sequence, k and lambda by the sign of A (arXiv 2602.10693; TRL's "vespo", its vespo_k_* and vespo_lambda_*). Taken in the
    log domain, log phi = k L + lambda (1 - e^L); TRL's clamps of L (at log 1e-8 and 20) are where phi has vanished.
    Advantages are A_i [B].

    Hyperparameters:
        power_positive, decay_positive: k and lambda for A >= 0, both >= 0. power_negative, decay_negative: for A < 0.
            Without decay, phi is w^k and drops its sequence where it overflows.

    Metrics: phi_mean, by token.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(2, 1, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0], [2.0]])
    >>> objectives.vespo(stats, mu, torch.ones(2), vk.Segments.padded(torch.ones(2, 1))).coefficients
    tensor([[5.0000e-01],
            [1.2941e-07]])
    """

    name: ClassVar[str] = "vespo"
    proximal_terms: ClassVar[tuple[str, ...]] = ()

    power_positive: float = 2.0
    decay_positive: float = 3.0
    power_negative: float = 3.0
    decay_negative: float = 2.0
    aggregation: str = "token-mean"

    def checked(self, check: Check) -> dict[str, Any]:
        names = ("power_positive", "decay_positive", "power_negative", "decay_negative")
        return self.each(check.finite_float, *names, minimum=0.0)

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        require_sequence_advantages(self.check, tokens)
        log_w = tokens.sequence_sum(tokens.log_weight).clamp(-1e30, UNTRUNCATED_LIMIT)  # finite: 0 * inf is no number
        good = tokens.advantages >= 0
        k = by_flag(good, self.power_positive, self.power_negative, log_w)
        decay = by_flag(good, self.decay_positive, self.decay_negative, log_w)
        phi = (k * log_w - decay * log_w.expm1()).exp()
        return TokenTerms(times(phi, tokens.advantages), metrics={"phi_mean": phi}, per_sequence=True)
