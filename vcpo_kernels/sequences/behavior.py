"""Where log mu came from, as far as the tokens' log-ratios tell: one warning a cause, with what to do about it.

Layer: tokens [N]. A behavior_logp that is not of these tokens, or not of this distribution, makes numbers that look healthy:
all weights vanish together, and the ESS ratio is 1. Only tensors that may be read are looked at (a CPU's, not compiling); on
a GPU the metrics `log_ratio_abs_mean` and `log_ratio_negative_fraction` say the same, to a trainer that logs them too
(`warn_of_means`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.dtypes import detached

FAR = 1.0  # nats a token: policies that are a hundred updates apart differ by tenths
ENOUGH_TOKENS = 64  # before a share of signs says anything
ONE_SIDED = 0.98  # of the tokens that differ at all
NOTICEABLE = 5e-3  # nats a token; below, a sampler's own rounding
DIFFERENT = 1e-4  # nats, as the next: a token's sign counts
POSITIVE = 1e-3  # from which on it is no log-probability
UNKNOWN = (
    "off by one (behavior_logp[:, t] belongs to ids[:, t]), another temperature or softcap than the sampler's, other token "
    "ids or attention masks (left padding needs position ids)?"
)

_said: set[str] = set()


def log_ratio_metrics(log_ratio: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Mean magnitude of log pi - log mu [N] over the tokens that count and have a finite one, and the share of them below 0."""
    values = log_ratio_values(log_ratio, valid)
    return log_ratio_means({name: value.sum(dtype=torch.float64) for name, value in values.items()})


def log_ratio_values(log_ratio: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """What `log_ratio_means` wants the sums of, in float64: [N], flags and magnitudes."""
    magnitude = log_ratio.abs()
    finite = valid & (magnitude < math.inf)
    return {
        "log_ratio_finite": finite,
        "log_ratio_abs": torch.where(finite, magnitude, 0.0),
        "log_ratio_negative": finite & (log_ratio < 0),
    }


def log_ratio_means(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two metrics, from the sums of `log_ratio_values` over whatever tokens."""
    count = sums["log_ratio_finite"].clamp(min=1)
    return {
        "log_ratio_abs_mean": sums["log_ratio_abs"] / count,
        "log_ratio_negative_fraction": sums["log_ratio_negative"] / count,
    }


def warn_of_behavior(
    where: str, logp: Tensor, behavior_logp: Tensor, valid: Tensor, log_ratio: Tensor | None = None
) -> None:
    """logp, behavior_logp: flat [N]. valid: bool [N], the tokens that count. log_ratio: logp - behavior_logp, of a caller who
    has it, where all three are 0 at other tokens.
    """
    if not checks.readable(logp) or not len(logp):
        return
    logp, behavior_logp = detached(logp), detached(behavior_logp)
    if log_ratio is None:
        log_ratio = torch.where(valid, logp - behavior_logp, 0.0)
        highest = torch.where(valid, behavior_logp, -math.inf).max()
    else:
        highest = behavior_logp.max()
    if not _healthy(highest, log_ratio, valid) and bool(valid.any()):
        theta, mu = logp[valid].double(), behavior_logp[valid].double()
        _say(where, _cause(theta, mu, logp, behavior_logp, valid))


def _healthy(highest: Tensor, log_ratio: Tensor, valid: Tensor) -> bool:
    """Whether four numbers rule out all of `_cause`, which has the last word where they do not. NaN and inf are no health."""
    total = torch.linalg.vector_norm(log_ratio, 1, dtype=torch.float64)
    above = (log_ratio > DIFFERENT).sum()
    peak, magnitude, more, count = torch.stack([highest, total, above, valid.sum()]).tolist()
    # One-sided are, noticeably, ONE_SIDED of those that differ.
    mixed = magnitude < NOTICEABLE * count or more > (1 - ONE_SIDED) * count
    return peak <= POSITIVE and 0 < magnitude <= FAR * count and mixed


def warn_of_means(where: str, tokens: float, abs_mean: float, negative_fraction: float) -> None:
    """The same from the two metrics of so many tokens, for trainers that have them on the host anyway."""
    if abs_mean > FAR:
        _say(where, ("far", f"log pi and log mu differ by {abs_mean:.1f} nats a token: {UNKNOWN}"))
    elif tokens >= ENOUGH_TOKENS and abs_mean >= NOTICEABLE and negative_fraction >= ONE_SIDED:
        _say(where, ("support", _of_part(f"{negative_fraction:.0%} of the tokens", abs_mean)))


def _say(where: str, found: tuple[str, str] | None) -> None:
    if found is not None and found[0] not in _said:
        _said.add(found[0])
        warnings.warn(f"{where}: {found[1]}", UserWarning, stacklevel=4)


def _cause(theta: Tensor, mu: Tensor, logp: Tensor, behavior_logp: Tensor, valid: Tensor) -> tuple[str, str] | None:
    """A name, and the text; None where nothing is suspicious."""
    finite = mu.isfinite() & theta.isfinite()
    if not bool(finite.any()):
        what = "NaN" if bool(mu.isnan().all()) else "not finite"
        return (
            "nothing",
            f"behavior_logp is {what} at all {len(mu)} valid tokens. Did the sampler record log-probabilities?",
        )
    theta, mu = theta[finite], mu[finite]
    highest = float(mu.max())
    if highest > POSITIVE:
        fix = "Probabilities? Take behavior_logp.log()." if highest <= 1.001 else "Negative logs? Take -behavior_logp."
        return "positive", f"behavior_logp holds values up to {highest:.3g}, and a log-probability is at most 0. {fix}"
    ratio = theta - mu
    far = float(ratio.abs().mean())
    if far > FAR:
        return "far", f"log pi and log mu differ by {far:.1f} nats a token: {_likely(far, logp, behavior_logp, valid)}"
    if far == 0 and len(ratio) > 1:
        return "identical", (
            "the ratio pi / mu is identically 1: behavior_logp is this policy's own logp, so that weights, ESS and step "
            "size do nothing. For stale rollouts pass the log-probabilities that the sampler recorded."
        )
    return _one_sided(ratio, far)


def _likely(far: float, logp: Tensor, behavior_logp: Tensor, valid: Tensor) -> str:
    for by, what in ((1, "one position late"), (-1, "one position early")):
        rolled = (logp - behavior_logp.roll(-by)).double()[valid]
        if float(rolled[rolled.isfinite()].abs().mean()) < far / 2:
            return f"off by one? It fits {what}: behavior_logp[:, t] belongs to ids[:, t]."
    return UNKNOWN


def _one_sided(ratio: Tensor, far: float) -> tuple[str, str] | None:
    """Every token less likely than mu says: mu was over fewer entries. Between two policies over the same, signs are mixed."""
    below, above = int((ratio < -DIFFERENT).sum()), int((ratio > DIFFERENT).sum())
    if below + above < ENOUGH_TOKENS or far < NOTICEABLE or below < ONE_SIDED * (below + above):
        return None
    return "support", _of_part(f"{below} of the {below + above} tokens where they differ", far)


def _of_part(where: str, far: float) -> str:
    return (
        f"log pi < log mu at {where}, by {far:.2g} nats a token: the sampler's probabilities seem to be over a part of the "
        "vocabulary (top-p, top-k, min-p), whose mass is missing from pi. Weights then vanish together while ESS looks "
        "healthy. Sample from the whole vocabulary, or record unrestricted log-probabilities."
    )
