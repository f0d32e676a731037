"""Arithmetic with numbers that a caller may change from call to call: right and one graph under torch.compile, math elsewhere.

Layer: core. What tensors are multiplied by, added to or compared with needs nothing of this.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from vcpo_kernels.core.library import define_op, nothing_returned

Number: TypeAlias = float | Tensor  # a tensor only in a graph that the number changes under: 0-d, float64, on the CPU

used = define_op("used(Tensor number) -> ()", nothing_returned, nothing_returned)  # see `changing.as_tensor`


def number(value: float) -> Number:
    """The value as it is; in a graph that it may change under, as a tensor (`core/changing.py`)."""
    if torch.compiler.is_compiling():
        from vcpo_kernels.core import changing

        if changing.may_change(value):
            return changing.as_tensor(value)
    return value


def log(value: float) -> Number:
    """log of a number > 0."""
    n = number(value)
    return n.log() if isinstance(n, Tensor) else math.log(n)


def log1p(value: float) -> Number:
    """log(1 + value) of a number > -1."""
    n = number(value)
    return n.log1p() if isinstance(n, Tensor) else math.log1p(n)


def clamped(values: Tensor, low: Number | None = None, high: Number | None = None) -> Tensor:
    """values.clamp(low, high)."""
    if torch.compiler.is_compiling():
        low, high = (b if b is None or isinstance(b, Tensor) else number(b) for b in (low, high))
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return values.clamp(low, high)
    if low is not None:  # one by one, two bounds may be of two kinds, and on another device
        values = torch.clamp_min(values, low)
    return values if high is None else torch.clamp_max(values, high)


def filled(like: Tensor, value: Number) -> Tensor:
    """torch.full_like(like, value)."""
    if torch.compiler.is_compiling() or isinstance(value, Tensor):
        return torch.zeros_like(like) + value
    return torch.full_like(like, value)
