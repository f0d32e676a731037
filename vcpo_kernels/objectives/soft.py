"""Objectives that taper the ratio smoothly instead of clipping it: SAPO by token, VESPO by sequence.

Layer: tokens [N]. Both gradients fall to 0 as the ratio grows, so neither overflows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import logsigmoid

from vcpo_kernels.core.checks import Check
from vcpo_kernels.objectives.build import TokenTerms, build_objective
from vcpo_kernels.objectives.common import CommonTerms
from vcpo_kernels.objectives.correction import Correction
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.tokens import TokenBatch, by_flag, times
from vcpo_kernels.objectives.weighted import require_sequence_advantages
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.sequences.log_weights import UNTRUNCATED_LIMIT
from vcpo_kernels.sequences.segments import Segments

if TYPE_CHECKING:
    from typing_extensions import Unpack


def sapo(
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    proximal_logp: Tensor | None = None,
    correction: Correction | None = None,
    aggregation: str = "seq-mean-token-mean",
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """SAPO: a sigmoid gate in place of the clip.

    Token objective f(r) A with f(r) = (4/tau) sigmoid(tau (r - 1)), tau by the sign of A (arXiv 2511.20347; TRL's and verl's
    "sapo"). Gradient 4 p (1 - p) r A grad logp, p = sigmoid(tau (r - 1)): that of r A at r = 1, fading on both sides.

    Args:
        stats, behavior_logp, advantages, segments, aggregation, common: see `objective_from_coefficients`.
        temperature_positive, temperature_negative: tau for A > 0 and for A <= 0, > 0; the larger, the faster the fading.
        proximal_logp, correction: as in `ppo_clip`.

    Returns:
        ObjectiveOutput; metrics gate_mean, of 4 p (1 - p).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0, 2.0]])
    >>> objectives.sapo(stats, mu, torch.tensor([1.0]), vk.Segments.padded(torch.ones(1, 2))).coefficients
    tensor([[0.5000, 0.0247]])
    """
    check = Check("sapo")
    positive = check.positive_float("temperature_positive", temperature_positive)
    negative = check.positive_float("temperature_negative", temperature_negative)

    def rule(tokens: TokenBatch) -> TokenTerms:
        log_r = tokens.log_ratio.clamp(max=UNTRUNCATED_LIMIT)  # both factors of the gradient stay finite; it is 0 there
        tau = by_flag(tokens.advantages > 0, positive, negative, log_r)
        z = tau * (log_r.exp() - 1)
        log_gate = math.log(4) + logsigmoid(z) + logsigmoid(-z)
        values = times(4 / tau * z.sigmoid(), tokens.advantages)
        return TokenTerms(times((log_gate + log_r).exp(), tokens.advantages), values, {"gate_mean": log_gate.exp()})

    return build_objective(
        check, rule, stats, behavior_logp, advantages, segments, common,
        aggregation=aggregation, proximal_logp=proximal_logp, correction=correction,
    )  # fmt: skip


def vespo(
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
    aggregation: str = "token-mean",
    **common: Unpack[CommonTerms],
) -> ObjectiveOutput:
    """VESPO: a gamma-shaped kernel of the sequence weight as a constant before log pi.

    Token objective sg[phi(w)] A log pi with phi(w) = w^k exp(lambda (1 - w)), phi(1) = 1, w = pi(y)/mu(y) over the whole
    sequence, k and lambda by the sign of A (arXiv 2602.10693; TRL's "vespo", its vespo_k_* and vespo_lambda_*). Taken in the
    log domain, log phi = k L + lambda (1 - e^L); TRL's clamps of L (at log 1e-8 and 20) are where phi has vanished.

    Args:
        stats, behavior_logp, segments, aggregation, common: see `objective_from_coefficients`.
        advantages: A_i [B].
        power_positive, decay_positive: k and lambda for A >= 0, both >= 0. power_negative, decay_negative: for A < 0.
            Without decay, phi is w^k and drops its sequence where it overflows.

    Returns:
        ObjectiveOutput; metrics phi_mean, by token.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> from vcpo_kernels import objectives
    >>> stats = vk.token_stats(torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(2, 1, dtype=torch.long))
    >>> mu = stats.logp.detach() - torch.tensor([[0.0], [2.0]])
    >>> objectives.vespo(stats, mu, torch.ones(2), vk.Segments.padded(torch.ones(2, 1))).coefficients
    tensor([[5.0000e-01],
            [1.2941e-07]])
    """
    check = Check("vespo")
    knobs = {
        "power_positive": power_positive,
        "decay_positive": decay_positive,
        "power_negative": power_negative,
        "decay_negative": decay_negative,
    }
    k_up, decay_up, k_down, decay_down = (check.finite_float(key, value, 0.0) for key, value in knobs.items())

    def rule(tokens: TokenBatch) -> TokenTerms:
        require_sequence_advantages(check, tokens)
        log_w = tokens.sequence_sum(tokens.log_weight).clamp(-1e30, UNTRUNCATED_LIMIT)  # finite: 0 * inf is no number
        good = tokens.advantages >= 0
        k = by_flag(good, k_up, k_down, log_w)
        decay = by_flag(good, decay_up, decay_down, log_w)
        phi = (k * log_w - decay * log_w.expm1()).exp()
        return TokenTerms(times(phi, tokens.advantages), metrics={"phi_mean": phi}, per_sequence=True)

    return build_objective(
        check,
        rule,
        stats,
        behavior_logp,
        advantages,
        segments,
        common,
        aggregation=aggregation,
    )
