"""Launch parameters: which table entry a device gets, and when rows may be read 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from vcpo_kernels.backends.triton import launch


def test_a_device_gets_the_newest_entry_not_newer_than_itself() -> None:
    assert launch.launches_for((7, 5)) is launch.LAUNCHES[(8, 0)]
    assert launch.launches_for((8, 9)) is launch.LAUNCHES[(8, 0)]
    assert launch.launches_for((9, 0)) is launch.LAUNCHES[(9, 0)]
    assert launch.launches_for((12, 0)) is launch.LAUNCHES[(10, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_accesses_need_every_row_on_16_bytes(dtype: torch.dtype) -> None:
    width = 16 // torch.empty(0, dtype=dtype).element_size()
    whole = torch.empty(2, 3, 8 * width, dtype=dtype)
    assert launch.vector_length(whole) == width
    assert launch.vector_length(whole[:, :2, :5]) == width  # an odd length is no obstacle, rows start where they did
    assert launch.vector_length(whole[:, :, 1:]) == 1
    odd = torch.empty(2, 3, 8 * width + 1, dtype=dtype)
    assert launch.vector_length(odd) == 1
    assert launch.vector_length(whole, odd) == 1
    assert launch.vector_length(odd[:, :1]) == 1  # as in the batch, so that a row's sums keep their order
