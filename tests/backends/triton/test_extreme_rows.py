"""Large finite fills and near-greedy temperatures in the Triton kernels: see tests/rows/test_extreme_rows.py."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.row_bounds import assert_gradient_close, assert_statistics_close
from tests.rows import row_inputs
from tests.rows.test_extreme_rows import exact, fills, greedy_rows, one_choice

pytest.importorskip("triton")
from vcpo_kernels.backends.triton import score_rows, token_stats

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the inf that the interpreter meets


@pytest.mark.parametrize("vocabulary", [10, 2100])
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_one_choice_left(dtype: torch.dtype, vocabulary: int, device: torch.device) -> None:
    for fill, temperature in zip(fills(dtype)[::3], (1.0, 0.6, 1e-3, 1e-6), strict=False):
        rows, ids = (t[None, :2].to(device) for t in one_choice(fill, dtype, vocabulary))
        settings = {"temperature": temperature, "softcap": None, "shift": False}
        ones = torch.ones(1, 2, device=device)
        gradient, scores = torch.empty_like(rows), torch.empty_like(rows)
        stats = token_stats.forward(rows, ids, None, **settings)
        token_stats.backward(gradient, rows, ids, None, stats.logp, stats.entropy, stats.lse, ones, ones, **settings)
        for each in (stats, score_rows.forward(scores, rows, ids, None, ones, **settings)):
            assert all((s == 0).all() for s in (each.logp, each.entropy, each.score_sqnorm)), fill
        assert (gradient == 0).all(), fill
        assert (scores == 0).all(), fill


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocabulary", [5, 2100])
@pytest.mark.parametrize(("spread", "temperature"), [(3.0, 1e-2), (3.0, 1e-4), (3.0, 1e-6), (1e4, 1e-5)])
def test_near_greedy(spread: float, temperature: float, vocabulary: int, inplace: bool, device: torch.device) -> None:
    """To the bound of any other temperature: none for what fp32 rounds of a logp of 1e9 when it is saved."""
    z, ids = greedy_rows(spread, torch.float32, vocabulary)
    z, ids = z[1:6], ids[1:6]
    g, h = torch.rand(5) + 0.1, torch.rand(5) + 0.1
    settings = {"temperature": temperature, "softcap": None, "shift": False}
    rows, token_ids, on_g, on_h = (t[None].to(device) for t in (z, ids, g, h))
    saved = token_stats.forward(rows, token_ids, None, **settings)
    want, want_grad = exact(z, ids, g, h, temperature)
    names = ("logp", "entropy", "score_sqnorm", "lse")
    statistics = [getattr(want, name)[None] for name in names]
    assert_statistics_close([s.cpu() for s in saved], statistics)
    small = [s.clamp(-32.0, 32.0) for s in statistics]
    out = rows.clone() if inplace else torch.empty_like(rows)
    read = out if inplace else rows
    token_stats.backward(out, read, token_ids, None, saved.logp, saved.entropy, saved.lse, on_g, on_h, **settings)
    assert_gradient_close(out.cpu(), want_grad[None], small, g[None], h[None], settings)
    out = rows.clone() if inplace else torch.empty_like(rows)
    stats = score_rows.forward(out, out if inplace else rows, token_ids, None, on_g, **settings)
    assert_statistics_close([s.cpu() for s in stats], statistics)
    assert_gradient_close(out.cpu(), exact(z, ids, g, 0 * h, temperature)[1][None], small, g[None], None, settings)
