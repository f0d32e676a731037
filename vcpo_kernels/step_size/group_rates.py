"""The learning rates of an optimizer's groups, multiplied for a while and then as if nothing had been."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GroupRates:
    """Multiplies every group's rate, and puts back what nobody else has set meanwhile.

    A float is known by its object and a tensor by its version, so that nothing is read from a device, and that somebody who
    happens to set the very value found here is heard too. Groups are known by their dicts: those that come and go in
    between keep the rates that others gave them.
    """

    def __init__(self) -> None:
        self._floats: list[tuple[dict[str, Any], Any, float]] = []  # group, its rate, what was put there
        self._tensors: list[tuple[Tensor, Tensor, int]] = []  # the rate, a copy of it, its version as left here
        self.scaled = False

    @torch.no_grad()
    def scale(self, optimizer: torch.optim.Optimizer, factor: Tensor, number: float | None = None) -> float | None:
        """rate *= factor, 0-d. A tensor's in place; a float's by `number`, which is read from `factor` where it is needed
        and not given, and returned.
        """
        rates = [group["lr"] for group in optimizer.param_groups]
        for rate in {id(r): r for r in rates if isinstance(r, Tensor)}.values():  # groups may share one tensor
            before = rate.clone()
            rate.mul_(factor.to(rate.device, rate.dtype))
            self._tensors.append((rate, before, rate._version))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if not isinstance(rate, Tensor):
                number = float(factor) if number is None else number
                group["lr"] = rate * number
                self._floats.append((group, rate, group["lr"]))
        self.scaled = True
        return number

    @torch.no_grad()
    def restore(self) -> None:
        """The rates as they were, or as others have set them since."""
        for group, rate, put in self._floats:
            if group["lr"] is put:
                group["lr"] = rate
        for tensor, before, version in self._tensors:
            if tensor._version == version:
                tensor.copy_(before)
        self._floats, self._tensors = [], []
        self.scaled = False
