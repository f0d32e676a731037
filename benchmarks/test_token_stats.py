"""Regression benchmarks: `pytest benchmarks --benchmark-enable --benchmark-autosave`, then `--benchmark-compare` later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases.rows import make_inputs, ours_backward, ours_forward, ours_inplace

SHAPES = ((64, 32000), (64, 151936), (4096, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("work", [ours_forward, ours_backward, ours_inplace])
def test_token_stats(benchmark: Any, work: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = make_inputs(*shape, dtype, torch.device("cpu"))
    benchmark(work, x)
