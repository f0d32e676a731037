"""TokenBatch: what an objective's rule sees of a batch, flat and detached, and the log-domain helpers it works with.

Layer: tokens [N]. Eager torch throughout: token-sized work is V times smaller than the passes over the logits around it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import detached, in_dtype, widened
from vcpo_kernels.core.scalars import Number, filled, number
from vcpo_kernels.rows.token_stats import TokenStats, check_stats
from vcpo_kernels.sequences.log_weights import UNTRUNCATED_LIMIT
from vcpo_kernels.sequences.segments import Segments, check_seen, check_segments


def exp_or_drop(log_values: Tensor) -> Tensor:
    """exp, except that e^80 and more become inf, whose token the builder drops and counts. NaN stays NaN."""
    return torch.where(log_values >= UNTRUNCATED_LIMIT, math.inf, log_values).exp()


def times(weights: Tensor, advantages: Tensor) -> Tensor:
    """weights * advantages, exactly 0 where either is 0, whatever the other holds."""
    return torch.where(torch.logical_and(weights, advantages), weights * advantages, 0.0)


def by_flag(flags: Tensor, yes: Number, no: Number, like: Tensor) -> Tensor:
    """One of two numbers per token, in the dtype of `like` (torch.where of two floats rounds them to float32)."""
    return torch.where(flags, filled(like, yes), no if isinstance(no, Tensor) else number(no))


@dataclass(frozen=True)
class TokenBatch:
    """Tokens [N] of a batch, detached, in fp32 or float64. Everything is 0 where `valid` is false, so it may hold no NaN there.

    logp, behavior_logp: log pi and log mu. advantages: A_t (an advantage per sequence is written to each of its tokens).
    log_weight: log pi/mu. log_ratio: log pi/pi_prox, what the method clips (log pi/mu without proximal_logp).
    log_correction: log pi_prox/mu (None without proximal_logp).
    valid: bool, the tokens that count. sequence_advantages: whether A was given per sequence.
    segments: whose token is whose, less what a shifted pass has no prediction for.
    """

    logp: Tensor
    behavior_logp: Tensor
    advantages: Tensor
    log_weight: Tensor
    log_ratio: Tensor
    log_correction: Tensor | None
    valid: Tensor
    sequence_advantages: bool
    segments: Segments
    _known: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def lengths(self) -> Tensor:
        """|T_i|, [B] float64. Where sequences are split over ranks, the first look at it is a collective."""
        if "lengths" not in self._known:
            self._known["lengths"] = in_dtype(self.segments.reduce(self.valid.to(self.logp.dtype)), torch.float64)
        return self._known["lengths"]

    @property
    def log_weights(self) -> Tensor:
        """L_i, the sum of log_weight, [B]. A collective like `lengths`."""
        if "log_weights" not in self._known:
            self._known["log_weights"] = self.segments.reduce(self.log_weight)
        return self._known["log_weights"]

    @property
    def ratio(self) -> Tensor:
        """exp(log_ratio); from e^80 on inf, which no gradient gets to see: its token is dropped and counted."""
        return exp_or_drop(self.log_ratio)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[N] -> [N]: each token gets the sum over its sequence's tokens (accumulated in float64)."""
        return self.spread(self._sums(values))

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[N] -> [N]: each token gets the mean over its sequence's tokens."""
        sums = self._sums(values)
        return self.spread(sums / in_dtype(self.lengths.clamp(min=1), sums.dtype))

    def _sums(self, values: Tensor) -> Tensor:
        return self.log_weights if values is self.log_weight else self.segments.reduce(values)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[B] -> [N] in logp's dtype, 0 where a token does not count."""
        return self.segments.expand(in_dtype(per_sequence, self.logp.dtype), self.logp.shape[0])

    def any_of_sequence(self, flags: Tensor) -> Tensor:
        """Bool [N] -> [N]: whether the flag is up at any token of the sequence that counts."""
        return self.sequence_sum(flags.to(self.logp.dtype)) > 0

    @property
    def mask(self) -> Tensor | None:
        """Deprecated: `valid`, or `segments.mask`."""
        warnings.warn("TokenBatch.mask is segments.mask; mask goes with the next version.", DeprecationWarning, 2)
        return self.segments.mask

    @property
    def live(self) -> Tensor:
        """Deprecated: `valid`."""
        warnings.warn("TokenBatch.live is called valid; live goes with the next version.", DeprecationWarning, 2)
        return self.valid


def token_batch(
    check: Check,
    stats: TokenStats,
    behavior_logp: Tensor,
    advantages: Tensor,
    segments: Segments,
    proximal_logp: Tensor | None = None,
) -> TokenBatch:
    """The checked arguments of an objective as a TokenBatch.

    Raises TypeError or ValueError naming the argument; on the CPU also for advantages that are not finite where they count.
    """
    check_segments(check, segments)
    check_stats(check, stats)
    # In fp32 the segment ops stay on a GPU's own kernels, which float64 has not.
    logp = widened(detached(segments.flat(check, "stats", stats.logp)))
    check_seen(check, segments, stats)
    segments = segments.seen_by(stats)
    valid = segments.valid(logp.numel())

    def tokens(name: str, value: Tensor) -> Tensor:
        return torch.where(valid, like_logp(check, name, value, segments, logp), 0.0)

    theta, mu = torch.where(valid, logp, 0.0), tokens("behavior_logp", behavior_logp)
    proximal = None if proximal_logp is None else tokens("proximal_logp", proximal_logp)
    per_sequence = isinstance(advantages, Tensor) and tuple(advantages.shape) == (segments.num_sequences,)
    if per_sequence:
        check.plain("advantages", advantages)
        check.same_device("advantages", advantages, "stats", logp)
        spread = segments.expand(in_dtype(detached(advantages), logp.dtype), logp.numel())
    else:
        _check_token_advantages(check, advantages, segments, stats.logp)
        spread = tokens("advantages", advantages)
    if checks.readable(spread) and len(spread) and not math.isfinite(torch.linalg.vector_norm(spread, math.inf)):
        at = int((~spread.isfinite()).nonzero()[0])
        raise check.value_error(
            f"advantages of valid tokens must be finite, got {float(spread[at])} at flat position {at}. "
            "Give failed samples a finite reward, or mask all their tokens out."
        )
    log_weight = theta - mu
    return TokenBatch(
        logp=theta,
        behavior_logp=mu,
        advantages=spread,
        log_weight=log_weight,
        log_ratio=log_weight if proximal is None else theta - proximal,
        log_correction=None if proximal is None else proximal - mu,
        valid=valid,
        sequence_advantages=per_sequence,
        segments=segments,
    )


def like_logp(check: Check, name: str, value: Tensor, segments: Segments, logp: Tensor) -> Tensor:
    """A floating token tensor as flat [N], detached, in logp's dtype, after checking that it belongs to the batch."""
    check.tensor(name, value, checks.FLOAT_DTYPES, f"Convert it: {name}.float().")
    flat = detached(segments.flat(check, name, value))
    check.shape(name, flat, logp.shape, "as many tokens as stats")
    return in_dtype(flat, logp.dtype)


def _check_token_advantages(check: Check, advantages: object, segments: Segments, logp: Tensor) -> None:
    check.tensor("advantages", advantages)
    assert isinstance(advantages, Tensor)
    if advantages.numel() != logp.numel():
        raise check.value_error(
            f"advantages must be [{segments.num_sequences}] (one per sequence) or have the shape of stats.logp, "
            f"{tuple(logp.shape)}, got {checks.describe(advantages)}. Flatten one per sequence: advantages.reshape(-1)."
        )


def require_sequence_advantages(check: Check, tokens: TokenBatch, instead: str = "") -> None:
    """Raise for advantages by token where the method knows only one per sequence."""
    if not tokens.sequence_advantages:
        raise check.value_error(
            f"advantages must be [{tokens.segments.num_sequences}], one per sequence: the method weighs whole "
            f"sequences. {instead}"
        )
