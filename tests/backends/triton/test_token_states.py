"""Triton's states of a vocabulary's shards, merged, are the statistics of whole rows."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch

from vcpo_kernels.backends.reference import merged_statistics as eager
from vcpo_kernels.backends.reference import token_stats as specification

pytest.importorskip("triton")
from vcpo_kernels.backends.triton import merged_statistics, token_states

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the inf that the interpreter meets


@pytest.mark.parametrize("merge", [eager, merged_statistics], ids=["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("magnitude", "temperature", "softcap", "shift"),
    [(3.0, 1.0, None, False), (3.0, 0.7, 5.0, True), (1e3, 1.0, None, False), (1e3, 1e-4, None, True)],
)
def test_merged_states(
    dtype: torch.dtype, magnitude: float, temperature: float, softcap: float | None, shift: bool, merge: ModuleType
) -> None:
    torch.manual_seed(0)
    size, starts = 301, (0, 1, 97, 301)
    rows = (torch.randn(2, 4, size) * magnitude).to(dtype)
    rows[0, 1, 97:] = -torch.inf
    rows[1, 2, 5] = torch.nan
    ids = torch.randint(0, size, (2, 4))
    ids[0, 2], ids[1, 1], ids[1, 3] = 0, size - 1, size  # the last is unknown
    rows[0, 3] = -torch.inf
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 0] = False
    settings = {"temperature": temperature, "softcap": softcap, "shift": shift}
    states = torch.stack(
        [
            token_states.forward(rows[..., begin:end], ids - begin, mask, **settings)
            for begin, end in itertools.pairwise(starts)
        ]
    )
    merged = merge.forward(states, ids, mask, size, **settings)
    want = specification.forward(rows, ids, mask, **settings)
    for name, value in want._asdict().items():
        got = getattr(merged, name)
        torch.testing.assert_close(got, value, atol=2e-6, rtol=2e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    valid = (merged.logp != 0) & (ids < size)
    known = torch.where(ids < size, ids, 0)
    row_ids = torch.roll(known, -1, 1) if shift else known
    targets = rows.gather(-1, row_ids[..., None])[..., 0].float()
    targets = torch.roll(targets, 1, 1) if shift else targets
    assert torch.equal(merged.target_logit[valid], targets[valid])
