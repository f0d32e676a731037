"""scale_ on Triton: a gradient times its upstream factor, in place, and left alone where that is 1."""

from __future__ import annotations

import math

import pytest
import torch

from tests.rows import row_inputs

pytest.importorskip("triton")
from vcpo_kernels.backends.triton import launch, scale


@pytest.mark.parametrize("dtype", row_inputs.DTYPES)
@pytest.mark.parametrize("rest", [-1, 0, 1])
def test_multiplies_as_torch_does(dtype: torch.dtype, rest: int, device: torch.device) -> None:
    size = 2 * launch.launches(device).scale.block + rest
    memory = torch.randn(size + 8, device=device).to(dtype)
    if dtype == torch.bfloat16:  # powers of two: the interpreter truncates, and this is not about rounding
        memory = memory.sign() * 2
    before, factor = memory.clone(), torch.tensor(-0.5, device=device)
    scale.forward(memory[:size], factor)
    assert torch.equal(memory[:size], before[:size] * factor.to(dtype))
    assert torch.equal(memory[size:], before[size:])


@pytest.mark.parametrize("size", [0, 1, 7, 8192])
def test_one_changes_nothing(size: int, device: torch.device) -> None:
    """Not a NaN's payload either, nor what a product would round."""
    gradient = torch.full((size,), math.nan, device=device)
    bits = gradient.view(torch.int32).clone()
    scale.forward(gradient, torch.tensor(1.0, device=device))
    assert torch.equal(gradient.view(torch.int32), bits)


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf])
def test_special_factors(factor: float, device: torch.device) -> None:
    gradient = torch.tensor([[1.0, -2.0], [0.0, 3.0]], device=device)
    wanted = gradient * factor
    scale.forward(gradient, torch.tensor(factor, device=device))
    torch.testing.assert_close(gradient, wanted, equal_nan=True, rtol=0, atol=0)


def test_views_with_gaps(device: torch.device) -> None:
    memory = torch.ones(4, 6, device=device)
    scale.forward(memory[:, 1:4], torch.tensor(2.0, device=device))
    wanted = torch.ones(4, 6)
    wanted[:, 1:4] = 2
    assert torch.equal(memory.cpu(), wanted)
