"""The row kernel score_rows, and token_stats's backward on blocks of the vocabulary, on every backend that runs here.

The fused head and weighted_logp are made of these two; the triton backend has the same tests in tests/backends/triton.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.rows import row_inputs
from tests.rows.row_checks import FIELDS, assert_gradient, assert_statistics, oracle
from vcpo_kernels import TokenStats
from vcpo_kernels.core import registry

DEVICE = torch.get_default_device()
PLAIN = {"temperature": 1.0, "softcap": None, "shift": False}


def score_rows(
    rows: Tensor, ids: Tensor, c: Tensor | None, mask: Tensor | None = None, inplace: bool = False, **settings: object
) -> tuple[TokenStats, Tensor]:
    """Statistics and c d logp / d rows, of the backend in force. rows [N, V]."""
    backend = registry.select("score_rows", DEVICE, rows.dtype)
    rows = rows.clone()
    out = rows if inplace else torch.empty_like(rows)
    batched = (None if t is None else t[None] for t in (ids, mask, c))
    stats = backend.forward(out[None], rows[None], *batched, **{**PLAIN, **settings})
    return TokenStats(*(s[0] for s in stats)), out


@pytest.mark.parametrize("vocabulary", (1, 33, 4097, 49152))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("kind", row_inputs.KINDS)
def test_matches_float64(implementation: str, kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    logits, ids = row_inputs.make(kind, 4, vocabulary, dtype)
    c = torch.randn(4)
    softcap = 30.0 if vocabulary == 33 else None
    settings = {"temperature": 0.9, "softcap": softcap}
    stats, scores = score_rows(logits, ids, c, inplace=vocabulary % 2 == 0, **settings)
    want, want_scores = oracle(logits, ids, c, torch.zeros(4), **settings)
    assert_statistics(stats, want)
    assert_gradient(scores, want_scores, c.abs() / 0.9, want)


@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
def test_statistics_are_those_of_token_stats_to_the_bit(native: object, dtype: torch.dtype) -> None:
    """With a gradient to keep exponentials for or without one, in place or not: the same numbers."""
    logits, ids = row_inputs.make("outliers", 6, 5001, dtype)
    c = torch.randn(6)
    c[2] = 0
    separate = registry._load("native", "token_stats").forward(logits[None], ids[None], None, **PLAIN)
    stats, scores = score_rows(logits, ids, c)
    in_place, in_place_scores = score_rows(logits, ids, c, inplace=True)
    assert torch.equal(scores, in_place_scores)
    for field, want in zip(FIELDS, separate, strict=True):
        assert torch.equal(getattr(stats, field), want[0])
        assert torch.equal(getattr(in_place, field), want[0])


def test_no_coefficients_are_ones(implementation: str) -> None:
    logits, ids = row_inputs.make("normal", 5, 100, torch.float32)
    assert torch.equal(score_rows(logits, ids, None)[1], score_rows(logits, ids, torch.ones(5))[1])


def test_rows_without_a_coefficient_still_have_statistics(implementation: str) -> None:
    """c = 0 writes zeros, even where the row is broken; the statistics show what it is."""
    logits, ids = row_inputs.make("normal", 3, 100, torch.float32)
    logits[1, 5] = math.inf
    stats, scores = score_rows(logits, ids, torch.tensor([1.0, 0.0, 0.0]))
    assert bool((scores[1:] == 0).all())
    assert stats.logp.isnan().tolist() == [False, True, False]
    assert float(stats.logp[2]) < 0


def test_masked_rows_are_never_looked_at(implementation: str) -> None:
    logits, ids = row_inputs.make("normal", 4, 100, torch.bfloat16)
    mask = torch.tensor([True, False, True, False])
    logits[~mask] = math.nan
    ids[~mask] = -100
    c = torch.where(mask, torch.randn(4), math.nan)
    stats, scores = score_rows(logits, ids, c, mask, inplace=True)
    assert bool((scores[~mask] == 0).all())
    assert bool(scores[mask].isfinite().all())
    for field in FIELDS:
        assert bool((getattr(stats, field)[~mask] == 0).all())


def test_nan_and_unknown_ids_show(implementation: str) -> None:
    """A NaN coefficient, a NaN logit, an id that no check could look at: NaN rows, never silence."""
    logits, ids = row_inputs.make("normal", 4, 100, torch.float32)
    logits[1, 3] = math.nan
    ids[2] = 100
    stats, scores = score_rows(logits, ids, torch.tensor([math.nan, 1.0, 1.0, 1.0]))
    assert scores.isnan().all(-1).tolist() == [True, True, True, False]
    assert stats.logp.isnan().tolist() == [False, True, True, False]


# --- token_stats.backward by blocks of the vocabulary ----------------------------------------------------------------


def by_blocks(logits: Tensor, ids: Tensor, saved: list[Tensor], g: Tensor, h: Tensor | None, width: int) -> Tensor:
    """d logits, block by block, each on a copy of its own."""
    backend = registry.select("token_stats", DEVICE, logits.dtype)
    target = logits.gather(1, ids[:, None]).T.float()
    pieces = []
    for begin in range(0, logits.shape[1], width):
        block = logits[:, begin : begin + width].clone()[None]
        upstream = (g[None], None if h is None else h[None])
        backend.backward(
            block, block, ids[None] - begin, None, *saved, *upstream, target_logits=target, **{**PLAIN, "softcap": 30.0}
        )
        pieces.append(block[0])
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("with_entropy", (False, True))
@pytest.mark.parametrize("dtype", row_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("kind", row_inputs.KINDS)
def test_blocks_make_the_whole_gradient(implementation: str, kind: str, dtype: torch.dtype, with_entropy: bool) -> None:
    """The sampled token's logit is handed over, since most blocks do not hold it: one_hot needs it to 1e4 ulps."""
    rows, vocabulary = 5, 1003
    logits, ids = row_inputs.make(kind, rows, vocabulary, dtype)
    g, h = torch.randn(rows), torch.randn(rows) if with_entropy else None
    want, want_grad = oracle(logits, ids, g, torch.zeros(rows) if h is None else h, softcap=30.0)
    saved = [s.float()[None] for s in (want.logp, want.entropy, want.lse)]
    got = by_blocks(logits, ids, saved, g, h, 300)
    size = g.abs() + (0 if h is None else h.abs() * (1 + want.entropy))
    assert_gradient(got, want_grad, size, want)


def test_a_target_elsewhere_is_no_unknown_id(implementation: str) -> None:
    """Only a NaN logp (which an id outside the whole vocabulary has) makes a block NaN."""
    logits, ids = row_inputs.make("normal", 2, 64, torch.float32)
    ids[:] = 50
    with torch.no_grad():
        stats = registry.select("token_stats", DEVICE, torch.float32).forward(logits[None], ids[None], None, **PLAIN)
    saved = [stats[0].clone(), stats[1], stats[3]]
    saved[0][0, 1] = math.nan
    got = by_blocks(logits, ids, saved, torch.ones(2), None, 32)
    assert bool(got[0].isfinite().all())
    assert bool(got[1].isnan().all())
