"""ObjectiveOutput: what every objective returns.

Layer: tokens [N] -> scalars.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vcpo_kernels.core.trees import TensorTree


@dataclass(frozen=True)
class ObjectiveOutput(TensorTree):
    """Result of an objective. Everything but `loss` is detached and stays on the device.

    loss: 0-d, differentiable in stats.logp (and stats.entropy where there is an entropy bonus). Its value is that of the
        loss as the method's paper writes it, its gradient exactly -coefficients.
    coefficients: [N] in the shape of stats.logp, one per token (vcpo_loss's are one per sequence), c_t; 0 where a token does
        not count. d loss / d logp_t = -c_t, the sign of `VCPOOutput.coefficients`. KL terms are in them. `weighted_logp` and
        `linear_weighted_logp` take -coefficients.
    entropy_coefficients: e_t likewise, d loss / d entropy_t = -e_t; None without an entropy bonus.
    log_weights: L_i = sum_t (logp_t - behavior_logp_t) [B], unclipped, whatever ratio the method itself uses.
    ess, ess_ratio: 0-d, of those log-weights. ess_moments: float64 [3], which `EssLearningRate` merges.
    metrics: 0-d tensors by name, safe to log later: `build.METRICS` and what the method adds.
    """

    loss: Tensor
    coefficients: Tensor
    entropy_coefficients: Tensor | None
    log_weights: Tensor
    ess: Tensor
    ess_ratio: Tensor
    ess_moments: Tensor
    metrics: dict[str, Tensor]
