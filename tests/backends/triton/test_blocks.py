"""token_stats' backward on blocks of the vocabulary, as a fused head takes it, against the whole row's in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.triton.row_bounds import PASSES, assert_gradient_close
from tests.rows import row_inputs
from vcpo_kernels.backends.reference import token_stats as reference

pytest.importorskip("triton")
from vcpo_kernels.backends.triton import token_stats

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the inf that the interpreter meets

PLAIN: dict[str, Any] = {"temperature": 1.0, "softcap": None, "shift": False}


def target_logits(logits: Tensor, ids: Tensor, shift: bool) -> Tensor:
    """Beside the entries [O, I]; NaN where nothing predicts one."""
    rows = logits.roll(1, 1) if shift else logits
    values = rows.gather(-1, ids.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1).float()
    if shift:
        values[:, 0] = math.nan
    return values


def by_blocks(
    logits: Tensor, ids: Tensor, mask: Tensor | None, saved: list[Tensor], g: Tensor | None, h: Tensor | None,
    bounds: list[int], inplace: bool, device: torch.device, **settings: Any,
) -> Tensor:  # fmt: skip
    """d logits of the kernel, block by block: each over a buffer of its own, or from one view into another."""
    targets = target_logits(logits, ids, settings["shift"])
    on = [None if t is None else t.to(device) for t in (mask, *saved, g, h)]
    read, written = logits.to(device), torch.empty_like(logits, device=device)
    for begin, end in zip([0, *bounds], [*bounds, logits.shape[-1]], strict=True):
        block, out = read[..., begin:end], written[..., begin:end]
        if inplace:
            block = block.clone(memory_format=torch.contiguous_format)
        into = block if inplace else out
        token_stats.backward(into, block, ids.to(device) - begin, *on, target_logits=targets.to(device), **settings)
        if inplace:
            out.copy_(block)
    return written.cpu()


def statistics(logits: Tensor, ids: Tensor, device: torch.device, **settings: Any) -> list[Tensor]:
    """logp, entropy, lse of the whole rows, as the kernel saves them."""
    logp, entropy, _, lse = (s.cpu() for s in token_stats.forward(logits.to(device), ids.to(device), None, **settings))
    return [logp, entropy, lse]


def upstream(turn: int, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    g, h = torch.randn(shape), torch.randn(shape)
    return (g if turn % 3 < 2 else None), (h if turn % 3 > 0 else None)


def check(logits: Tensor, ids: Tensor, turn: int, bounds: list[int], device: torch.device, **settings: Any) -> None:
    exact = reference.forward(logits.double(), ids, None, **settings)
    g, h = upstream(turn, ids.shape)
    wanted = torch.empty(logits.shape, dtype=torch.float64)
    saved = (exact[0], exact[1], exact[3])
    reference.backward(wanted, logits.double(), ids, None, *saved, g, h, **settings)
    ours = statistics(logits, ids, device, **settings)
    got = by_blocks(logits, ids, None, ours, g, h, bounds, turn % 2 == 0, device, **settings)
    assert_gradient_close(got, wanted, exact, g, h, settings)


@pytest.mark.parametrize("kind", row_inputs.KINDS)
@pytest.mark.parametrize("dtype", row_inputs.DTYPES)
def test_blocks_make_the_whole_gradient(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Most blocks do not hold the target, whose logit is handed to all."""
    turn = list(row_inputs.KINDS).index(kind) + row_inputs.DTYPES.index(dtype)
    temperature, softcap, shift = PASSES[turn % len(PASSES)]
    logits, ids = row_inputs.make(kind, 4, 100, dtype)
    settings = {"temperature": temperature, "softcap": softcap, "shift": shift}
    check(logits.view(2, 2, 100), ids.view(2, 2), turn, [40, 93], device, **settings)


@pytest.mark.parametrize("kind", ["normal", "one_hot", "offset", "peaked_elsewhere"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("shift", [False, True])
def test_two_blocks_in_every_setting(kind: str, softcap: float | None, shift: bool, device: torch.device) -> None:
    logits, ids = row_inputs.make(kind, 4, 66, torch.float32)
    settings = {"temperature": 0.7, "softcap": softcap, "shift": shift}
    check(logits.view(2, 2, 66), ids.view(2, 2), 1, [32], device, **settings)


@pytest.mark.parametrize(("offset", "sink"), [(1e4, 0.0), (-1e4, 0.0), (0.0, 1e4)])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_precision_does_not_depend_on_how_far_logits_lie_from_zero(
    offset: float, sink: float, turn: int, device: torch.device
) -> None:
    """Of logp and lse one is 1e4, an ulp of which is 1e-3; the other, and the target's logit, have every digit."""
    logits, ids = torch.randn(1, 4, 6), torch.tensor([[1, 5, 2, 4]])
    logits.scatter_add_(-1, ids.unsqueeze(-1), torch.full((1, 4, 1), -sink))
    check(logits + offset, ids, turn, [3], device, **PLAIN)


@pytest.mark.parametrize("target", [0, 4499, 4500, 6548, 8999, 9000])
def test_blocks_of_several_of_the_kernels_own(target: int, device: torch.device) -> None:
    """A target in the plain blocks or the ragged end of one of them, which the other must not take for its own."""
    logits, ids = torch.randn(1, 2, 9001).bfloat16(), torch.tensor([[target, 3]])
    check(logits, ids, 1, [4500], device, **PLAIN)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_nan_logp_makes_every_block_nan(softcap: float | None, turn: int, device: torch.device) -> None:
    """An id outside the whole vocabulary has one; a target in another block has not, and harms nothing."""
    logits, ids = torch.randn(1, 4, 64), torch.tensor([[50, 64, 3, 40]])
    settings = {"temperature": 1.0, "softcap": softcap, "shift": False}
    saved = statistics(logits, ids, device, **settings)
    assert saved[0][0].isnan().tolist() == [False, True, False, False]
    saved[0][0, 3] = math.nan
    g, h = upstream(turn, ids.shape)
    for inplace in (False, True):
        got = by_blocks(logits, ids, None, saved, g, h, [32], inplace, device, **settings)
        assert got[0, 1::2].isnan().all()
        assert got[0, ::2].isfinite().all()
        assert (got[0, ::2] != 0).all()


def test_blocks_of_rows_that_take_no_part_are_zero_and_not_read(device: torch.device) -> None:
    """Masked out, without a gradient, or the last of a sequence under shift."""
    logits, ids = torch.randn(1, 4, 40), torch.randint(0, 40, (1, 4))
    settings = {"temperature": 1.0, "softcap": None, "shift": True}
    saved = statistics(logits, ids, device, **settings)
    mask = torch.tensor([[True, False, True, True]])
    g = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    logits[0, [0, 1, 3]] = math.nan  # rows 0, 1, 3: masked target, no gradient, no target
    got = by_blocks(logits, ids, mask, saved, g, None, [16], True, device, **settings)
    assert (got[0, [0, 1, 3]] == 0).all()
    assert (got[0, 2] != 0).all()
    assert got[0, 2].isfinite().all()
