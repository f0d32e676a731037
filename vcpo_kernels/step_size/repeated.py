"""A step that an engine takes in several calls of the inner optimizer, each with other parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor


class SteppedParameters:
    """Those stepped since a step began.

    DeepSpeed's ZeRO hands its inner optimizer the parameters of one group (stages 1 and 2) or sub-group (stage 3) at a time.
    A call with parameters none of which was stepped goes on with the step; one with the same begins another.
    """

    def __init__(self) -> None:
        self._stepped: dict[int, weakref.ref[Tensor]] = {}

    def go_on_with(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a call with what the optimizer holds now is a part of the step that began."""
        now = list(_parameters(optimizer))
        return bool(self._stepped) and bool(now) and not any(self._has(p) for p in now)

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        self._stepped.update((id(p), weakref.ref(p)) for p in _parameters(optimizer))

    def clear(self) -> None:
        self._stepped.clear()

    def _has(self, parameter: Tensor) -> bool:
        found = self._stepped.get(id(parameter))
        return found is not None and found() is parameter


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
