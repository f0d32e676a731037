"""How far a row kernel may be from the reference in float64, and the settings it is compared under."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.rows.statistics import RowStatistics

NAMES = RowStatistics._fields
PASSES = tuple(itertools.product((1.0, 0.7), (None, 30.0), (False, True)))
BOUND = registry.BACKENDS["triton"].relative_error

# One rounding; bfloat16 is truncated by the interpreter, which is one ulp.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


def assert_statistics_close(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for name, got, want in zip(NAMES, ours, expected, strict=True):
        assert got.dtype == torch.float32
        error = (got.double() - want).abs() / (1 + want.abs())
        same = (got.double() == want) | (got.isnan() & want.isnan()) | (error <= BOUND)
        assert same.all(), f"{name}: {got[~same]} for {want[~same]}, relative error {error[~same]}"


def assert_gradient_close(
    got: Tensor,  # [O, I, V]
    wanted: Tensor,  # [O, I, V] float64
    exact: Sequence[Tensor],  # logp, entropy, score_sqnorm, lse [O, I] float64
    g: Tensor | None,  # [O, I]: gradient to logp, as the next to entropy
    h: Tensor | None,
    settings: Mapping[str, Any],
) -> None:
    # p is as good as the statistic that its exponent was measured from, an ulp of min(|logp|, |lse|).
    logp, entropy, _, lse = exact
    p_error = 1 + torch.minimum(logp.abs(), lse.abs())
    zero = torch.zeros_like(logp)
    upstream = sum(
        t.abs().double() * w for t, w in ((zero if g is None else g, 1.0), (zero if h is None else h, 1 + entropy))
    )
    scale = (p_error * upstream).nan_to_num(1.0, 1.0, 1.0) / settings["temperature"]
    if settings["shift"]:
        scale = scale.roll(-1, 1)
    error = (got.double() - wanted).abs()
    limit = ROUNDING[got.dtype] * wanted.abs() + BOUND * scale.unsqueeze(-1)
    same = (got.isnan() & wanted.isnan()) | (error <= limit)
    assert same.all(), f"{got[~same][:8]} for {wanted[~same][:8]}"
