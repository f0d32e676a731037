"""Says once that VCPO has nothing to correct: with weights that are all 1, ESS is the whole batch and the rate stays."""

from __future__ import annotations

import warnings

TOLERANCE = 0.01  # |L_i| up to which w_i is 1 to two digits: the rounding of two passes over the same parameters
IDLE = "so every weight is 1, ESS is the whole batch and the rate is not scaled: VCPO is idle, but for its baseline."


class IdleWatch:
    """Of one loss. where: what the warning begins with. patience: so many losses in a row, all of weights 1, make it speak;
    the first with another weight silences it for good.
    """

    def __init__(self, where: str, patience: int) -> None:
        self._where = where
        self._left = patience

    def see(self, ess_ratio: float, mean: float, highest: float, reason: str, fix: str) -> None:
        """One loss's ESS / B and L_i, as numbers that are on the host anyway. NaN is no weight of 1."""
        if self._left <= 0:
            return
        idle = ess_ratio > 1 - TOLERANCE**2 and abs(mean) <= TOLERANCE and abs(highest) <= TOLERANCE
        self._left = self._left - 1 if idle else 0
        if idle and self._left == 0:
            self._speak(reason, fix)

    def certain(self, reason: str, fix: str) -> None:
        """Where no log-probability but the trainer's own is there, numbers need not be waited for."""
        if self._left > 0:
            self._left = 0
            self._speak(reason, fix)

    def _speak(self, reason: str, fix: str) -> None:
        warnings.warn(f"{self._where}: {reason}, {IDLE} {fix}", UserWarning, stacklevel=4)
