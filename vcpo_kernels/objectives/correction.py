"""Correction: importance weights w = pi/mu that are truncated or masked, by token or by sequence.

Layer: tokens [N]. The one definition behind truncated IS, masked IS (MIS) and IcePop, and behind the factor pi_prox/mu that
any clipped objective may take (decoupled PPO, TRL's and verl's rollout correction).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.scalars import Number, clamped, log
from vcpo_kernels.objectives.tokens import TokenBatch, exp_or_drop

MODES = ("truncate", "mask")
LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class Correction:
    """Which importance weight stands before a token's term, as a constant.

    mode: "truncate" min(max(w, minimum), maximum) | "mask" w inside [minimum, maximum], 0 outside.
    level: "token" w_t = exp(d_t) | "sequence" w_i = exp(sum_t d_t), of every token of the sequence alike.
    minimum, maximum: None: no bound on that side. Without a maximum, weights of e^80 and more are dropped and counted.

    Raises TypeError or ValueError naming the field.

    >>> from vcpo_kernels import objectives
    >>> objectives.Correction("mask", "token", minimum=0.5, maximum=5.0)  # IcePop's
    Correction(mode='mask', level='token', minimum=0.5, maximum=5.0)
    """

    mode: str = "truncate"
    level: str = "token"
    minimum: float | None = None
    maximum: float | None = 2.0

    def __post_init__(self) -> None:
        Check("Correction").choice("mode", self.mode, MODES)
        Check("Correction").choice("level", self.level, LEVELS)
        check_bounds(Check("Correction"), "minimum", self.minimum, "maximum", self.maximum)


def check_bounds(check: Check, low_name: str, low: float | None, high_name: str, high: float | None) -> dict[str, Any]:
    """Both by name, as floats or None. Raises unless they are None or finite and > 0, and low <= high."""
    low = check.optional_positive_float(low_name, low)
    high = check.optional_positive_float(high_name, high)
    if low is not None and high is not None and low > high:
        raise check.value_error(f"{low_name} must be <= {high_name}, got {low_name}={low} and {high_name}={high}.")
    return {low_name: low, high_name: high}


def log_or(bound: float | None, otherwise: float) -> Number:
    """log of a bound, or what stands for its absence."""
    return otherwise if bound is None else log(bound)


def corrected_weights(tokens: TokenBatch, log_ratio: Tensor, correction: Correction) -> tuple[Tensor, Tensor]:
    """The weight of each token [N], and whether its bounds acted on it (bool [N]). NaN where log_ratio is NaN."""
    log_w = log_ratio if correction.level == "token" else tokens.sequence_sum(log_ratio)
    low, high = log_or(correction.minimum, -math.inf), log_or(correction.maximum, math.inf)
    outside = log_w > high if correction.minimum is None else (log_w < low) | (log_w > high)
    if correction.mode == "truncate":
        return exp_or_drop(clamped(log_w, low, high)), outside
    return torch.where(outside, 0.0, exp_or_drop(log_w)), outside
