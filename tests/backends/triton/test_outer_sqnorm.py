"""outer_sqnorm's Triton kernels, against the products formed in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import vcpo_kernels as vk
from tests.sequence_gradients.test_outer_sqnorm import assert_close, batch
from vcpo_kernels.sequence_gradients.outer_sqnorm import outer_sqnorm


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", ("ghost", "instantiated", "auto"))
def test_matches_the_formed_product(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Three strips of rows and a part, an empty sequence, widths that fill no tile; a bound on the length that is loose."""
    left, right, offsets = batch((5, 0, 200, 64), 70, 33, dtype)
    with vk.use_backend("triton"):
        got = outer_sqnorm(left.to(device), right.to(device), offsets.to(device), 250, form)
    assert_close(got, left, right, offsets)


@pytest.mark.parametrize("form", ("ghost", "instantiated"))
def test_strided_rows_and_repeats(form: str, device: torch.device) -> None:
    """Columns of a wider matrix are read in place; the same call gives the same bits."""
    left, right, offsets = (t.to(device) for t in batch((30, 20), 40, 24, torch.float32))
    with vk.use_backend("triton"):
        got = [outer_sqnorm(left[:, :17], right, offsets, 30, form) for _ in range(2)]
        want = outer_sqnorm(left[:, :17].contiguous(), right, offsets, 30, form)
    assert torch.equal(*got)
    assert torch.equal(got[0], want)
