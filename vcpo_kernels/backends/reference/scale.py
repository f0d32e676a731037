"""The specification of scale_ in eager torch."""

from __future__ import annotations

from torch import Tensor


def forward(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a 0-d tensor. On a CPU, where looking at it is free, 1 costs nothing."""
    if gradient.device.type != "cpu" or factor.item() != 1:
        gradient.mul_(factor)
