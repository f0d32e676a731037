"""score_rows against the reference in float64: the statistics of a row and, in the same pass, c d logp / d row.

The grid is small for the interpreter's sake, as in test_token_stats.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.triton.row_bounds import PASSES, assert_gradient_close, assert_statistics_close
from tests.rows import row_inputs
from vcpo_kernels.backends.reference import score_rows as reference

pytest.importorskip("triton")
from vcpo_kernels.backends.triton import launch, score_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the inf that the interpreter meets

PLAIN: dict[str, Any] = {"temperature": 1.0, "softcap": None, "shift": False}


def run(
    rows: Tensor, ids: Tensor, mask: Tensor | None, c: Tensor | None, device: torch.device,
    inplace: bool = False, **settings: Any,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The kernel's scores [O, I, V] and statistics [O, I]; `rows` stay as they are."""
    read = rows.to(device).clone() if inplace else rows.to(device)
    out = read if inplace else torch.empty_like(read)
    on = [None if t is None else t.to(device) for t in (ids, mask, c)]
    stats = score_rows.forward(out, read, *on, **settings)
    return out.cpu(), [s.cpu() for s in stats]


def check(
    rows: Tensor, ids: Tensor, mask: Tensor | None, c: Tensor | None, device: torch.device,
    inplace: bool = False, **settings: Any,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    scores, stats = run(rows, ids, mask, c, device, inplace, **settings)
    wanted = torch.empty(rows.shape, dtype=torch.float64)
    exact = reference.forward(wanted, rows.double(), ids, mask, c, **settings)
    assert_statistics_close(stats, exact)
    assert_gradient_close(scores, wanted, exact, torch.ones(ids.shape) if c is None else c, None, settings)
    return scores, stats


def block_of(rows: Tensor, softcap: float | None, device: torch.device) -> int:
    """Elements that a program takes at a time."""
    table = launch.launches(device)
    chosen = table.score if softcap is None else table.score_softcap
    return chosen.vectors * chosen.lanes * launch.access_elements(rows)


@pytest.mark.parametrize("kind", row_inputs.KINDS)
@pytest.mark.parametrize("vocabulary", [1, 7, 33])
@pytest.mark.parametrize("dtype", row_inputs.DTYPES)
def test_small_rows(kind: str, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    turn = list(row_inputs.KINDS).index(kind) + vocabulary + row_inputs.DTYPES.index(dtype)
    temperature, softcap, shift = PASSES[turn % len(PASSES)]
    logits, ids = row_inputs.make(kind, 3, vocabulary, dtype)
    settings = {"temperature": temperature, "softcap": softcap, "shift": shift}
    check(logits.view(1, 3, vocabulary), ids.view(1, 3), None, torch.randn(1, 3), device, turn % 2 == 0, **settings)


@pytest.mark.parametrize("kind", row_inputs.KINDS)
@pytest.mark.parametrize(("blocks", "rest"), [(1, -1), (1, 1), (3, 0)])
def test_rows_of_several_blocks(kind: str, blocks: int, rest: int, device: torch.device) -> None:
    turn = list(row_inputs.KINDS).index(kind) + blocks + rest
    temperature, softcap, _ = PASSES[turn % len(PASSES)]
    dtype = row_inputs.DTYPES[turn % 3]
    vocabulary = blocks * block_of(torch.empty(0, dtype=dtype), softcap, device) + rest
    logits, ids = row_inputs.make(kind, 2, vocabulary, dtype)
    settings = {"temperature": temperature, "softcap": softcap, "shift": False}
    check(logits.view(2, 1, vocabulary), ids.view(2, 1), None, torch.randn(2, 1), device, turn % 2 == 1, **settings)


@pytest.mark.parametrize("kind", ["normal", "peaked"])
def test_rows_of_a_real_vocabulary(kind: str, device: torch.device) -> None:
    logits, ids = row_inputs.make(kind, 2, 151936, torch.bfloat16)
    check(logits[None], ids[None], None, torch.randn(1, 2), device, True, **PLAIN)


@pytest.mark.parametrize(("block", "offset"), [(0, 0), (1, -1), (1, 0), (2, 5), (3, -1), (3, 0), (3, 8)])
def test_target_in_every_kind_of_block(block: int, offset: int, device: torch.device) -> None:
    """First, middle and last full block, and the ragged end: both plain loops skip the target's block only."""
    width = block_of(torch.empty(0, dtype=torch.float16), 20.0, device)
    logits = torch.randn(1, 1, 3 * width + 9, dtype=torch.float16)
    ids = torch.tensor([[block * width + offset]])
    settings = {"temperature": 1.0, "softcap": 20.0, "shift": False}
    check(logits, ids, None, torch.full((1, 1), -2.0), device, True, **settings)


@pytest.mark.parametrize(("offset", "sink"), [(1e4, 0.0), (-1e4, 0.0), (0.0, 1e4)])
def test_precision_does_not_depend_on_how_far_logits_lie_from_zero(
    offset: float, sink: float, device: torch.device
) -> None:
    """Of logp and lse one is 1e4, an ulp of which is 1e-3; the other has every digit."""
    logits, ids = torch.randn(1, 4, 6), torch.tensor([[1, 5, 2, 4]])
    logits.scatter_add_(-1, ids.unsqueeze(-1), torch.full((1, 4, 1), -sink))
    check(logits + offset, ids, None, torch.randn(1, 4), device, **PLAIN)


def test_no_coefficients_are_ones(device: torch.device) -> None:
    logits, ids = torch.randn(2, 2, 100), torch.randint(0, 100, (2, 2))
    scores, _ = check(logits, ids, None, None, device, **PLAIN)
    assert torch.equal(scores, run(logits, ids, None, torch.ones(2, 2), device, **PLAIN)[0])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocabulary", [40, 20000])
def test_rows_without_a_coefficient_still_have_statistics(vocabulary: int, inplace: bool, device: torch.device) -> None:
    """c = 0 writes zeros, even where the row is broken; the statistics show what it is."""
    logits, ids = torch.randn(1, 3, vocabulary), torch.randint(0, vocabulary, (1, 3))
    logits[0, 1, 5] = math.inf
    ids[0, 1] = 6
    scores, stats = run(logits, ids, None, torch.tensor([[1.0, 0.0, -0.0]]), device, inplace, **PLAIN)
    assert scores[0].any(-1).tolist() == [True, False, False]
    assert stats[0][0].isnan().tolist() == [False, True, False]
    with_all = run(logits, ids, None, None, device, inplace, **PLAIN)[1]
    for got, want in zip(stats, with_all, strict=True):
        assert torch.equal(got[0, ::2], want[0, ::2])


@pytest.mark.parametrize("inplace", [False, True])
def test_masked_rows_are_never_read(inplace: bool, device: torch.device) -> None:
    logits, ids, c = torch.randn(2, 3, 40), torch.randint(0, 40, (2, 3)), torch.randn(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    logits[~mask] = math.nan
    c[~mask] = math.nan
    ids[~mask] = -100
    scores, stats = run(logits, ids, mask, c, device, inplace, **PLAIN)
    assert (scores[~mask] == 0).all()
    assert all((s[~mask] == 0).all() for s in stats)
    wanted = torch.empty(logits.shape, dtype=torch.float64)
    readable = torch.where(mask, c, 0.0)  # a bound of NaN would let nothing pass
    exact = reference.forward(wanted, logits.double(), ids, mask, readable, **PLAIN)
    assert_statistics_close(stats, exact)
    assert_gradient_close(scores, wanted, exact, readable, None, PLAIN)


def test_shift_leaves_the_last_row_out(device: torch.device) -> None:
    logits, ids, c = torch.randn(2, 4, 50), torch.randint(0, 50, (2, 4)), torch.randn(2, 4)
    logits[:, -1] = math.nan  # predicts nothing
    ids[:, 0] = -100  # predicted by nothing
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    for inplace in (False, True):
        scores, stats = check(logits, ids, mask, c, device, inplace, temperature=0.9, softcap=None, shift=True)
        assert (scores[:, -1] == 0).all()
        assert all((s[:, 0] == 0).all() for s in stats)
        assert scores.any(-1).tolist() == [[True, True, False, False], [False, True, True, False]]


@pytest.mark.parametrize("bad", [-1, 40, 2**40, -(2**62)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_id_outside_the_vocabulary_is_nan(bad: int, softcap: float | None, device: torch.device) -> None:
    logits, ids = torch.randn(1, 3, 40), torch.tensor([[bad, 3, bad]])
    settings = {"temperature": 1.0, "softcap": softcap, "shift": False}
    scores, stats = check(logits, ids, None, torch.tensor([[1.0, 1.0, 0.0]]), device, **settings)
    assert scores[0].isnan().all(-1).tolist() == [True, False, False]
    for field, unknown in zip(stats, (True, False, True, False), strict=True):
        assert field[0].isnan().tolist() == [unknown, False, unknown]


def test_rows_of_nothing_and_of_nan(device: torch.device) -> None:
    """A target at -inf, a row of -inf alone, a NaN logit, a +inf logit, a NaN coefficient."""
    logits, ids = torch.randn(1, 5, 33), torch.full((1, 5), 5)
    logits[0, 0, 5] = -math.inf
    logits[0, 1] = -math.inf
    logits[0, 2, 7] = math.nan
    logits[0, 3, 9] = math.inf
    c = torch.tensor([[2.0, 2.0, 2.0, 2.0, math.nan]])
    scores, stats = run(logits, ids, None, c, device, **PLAIN)
    assert scores[0].isnan().all(-1).tolist() == [False, True, True, True, True]
    assert stats[0][0].isnan().tolist() == [False, True, True, True, False]
    first, _ = check(logits[:, :1], ids[:, :1], None, c[:, :1], device, **PLAIN)
    assert float(first[0, 0, 5]) == 2.0


def views() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits [2, 3, 40] that are no plain tensor, and the memory they lie in; rows of 41 do not start on 16 bytes."""
    wide, odd, turned, flat = torch.randn(2, 6, 48), torch.randn(2, 6, 41), torch.randn(3, 2, 40), torch.randn(260)
    return {
        "sequence slice": (wide[:, :3, :40], wide),
        "every second row": (wide[:, ::2, :40], wide),
        "odd row stride": (odd[:, :3, :40], odd),
        "odd first element": (wide[:, 3:, 1:41], wide),
        "transposed batch": (turned.transpose(0, 1), turned),
        "aligned rows, odd outer stride": (flat.as_strided((2, 3, 40), (130, 40, 1)), flat),
    }


@pytest.mark.parametrize("name", views())
@pytest.mark.parametrize("which", ["rows", "out", "both"])
def test_views_are_read_and_written_in_place(name: str, which: str, device: torch.device) -> None:
    """Rows, scores or both are a view; what lies between its rows stays as it was."""
    view, memory = views()[name]
    logits, ids, c = view.clone().contiguous(), torch.randint(0, 40, (2, 3)), torch.randn(2, 3)
    around = memory.clone()
    around.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    memory = memory.to(device)
    view = memory.as_strided(view.shape, view.stride(), view.storage_offset())
    rows = logits.to(device) if which == "out" else view
    out = torch.empty(2, 3, 40, device=device) if which == "rows" else view
    stats = score_rows.forward(out, rows, ids.to(device), None, c.to(device), **PLAIN)
    wanted = torch.empty(logits.shape, dtype=torch.float64)
    exact = reference.forward(wanted, logits.double(), ids, None, c, **PLAIN)
    assert_statistics_close([s.cpu() for s in stats], exact)
    assert_gradient_close(out.cpu(), wanted, exact, c, None, PLAIN)
    if which == "rows":
        assert torch.equal(view.cpu(), logits)
    else:
        view.zero_()
        assert torch.equal(memory.cpu(), around)


def test_expanded_rows_are_read(device: torch.device) -> None:
    logits, ids = torch.randn(2, 1, 40).expand(2, 3, 40), torch.randint(0, 40, (2, 3))
    out = torch.empty(2, 3, 40, device=device)
    one = logits.to(device)
    score_rows.forward(out, one, ids.to(device), None, None, **PLAIN)
    assert torch.equal(out.cpu(), run(logits.contiguous(), ids, None, None, device, **PLAIN)[0])


@pytest.mark.parametrize("dtype", row_inputs.DTYPES)
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_in_place_equals_out_of_place(dtype: torch.dtype, softcap: float | None, device: torch.device) -> None:
    vocabulary = 2 * block_of(torch.empty(0, dtype=dtype), softcap, device) + 70
    logits, ids, c = torch.randn(1, 2, vocabulary, dtype=dtype), torch.tensor([[3, vocabulary - 1]]), torch.randn(1, 2)
    settings = {"temperature": 0.8, "softcap": softcap, "shift": False}
    apart, stats = run(logits, ids, None, c, device, False, **settings)
    over, stats_over = run(logits, ids, None, c, device, True, **settings)
    assert torch.equal(apart, over)
    for one, other in zip(stats, stats_over, strict=True):
        assert torch.equal(one, other)


def test_rows_do_not_depend_on_the_batch(device: torch.device) -> None:
    """Bitwise: the same again, and each row alone."""
    logits, ids, c = torch.randn(1, 3, 20001), torch.randint(0, 20001, (1, 3)), torch.randn(1, 3)
    settings = {"temperature": 0.8, "softcap": None, "shift": False}
    whole, again = (run(logits, ids, None, c, device, **settings) for _ in range(2))
    alone = [run(logits[:, i : i + 1], ids[:, i : i + 1], None, c[:, i : i + 1], device, **settings) for i in range(3)]
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[0], torch.cat([a[0] for a in alone], 1))
    for field in range(4):
        assert torch.equal(whole[1][field], again[1][field])
        assert torch.equal(whole[1][field], torch.cat([a[1][field] for a in alone], 1))


def test_no_rows(device: torch.device) -> None:
    rows, ids = torch.empty(1, 0, 5, device=device), torch.empty(1, 0, dtype=torch.int64, device=device)
    stats = score_rows.forward(rows, rows, ids, None, None, **PLAIN)
    assert all(s.shape == (1, 0) and s.dtype == torch.float32 for s in stats)
