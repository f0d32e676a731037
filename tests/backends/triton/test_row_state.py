"""The merge rule: states of disjoint pieces of a row, merged, are the state of the row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from vcpo_kernels.backends.reference import token_stats as reference
from vcpo_kernels.backends.triton import row_state

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the inf that the interpreter meets

TEMPERATURE = 0.7
SCALE = math.log2(math.e) / TEMPERATURE


@triton.jit
def merge_kernel(out_ptr, state_ptr, z_target, scale, temperature, PIECES: tl.constexpr):
    piece = tl.arange(0, PIECES)
    fields = tl.load(state_ptr + piece), tl.load(state_ptr + PIECES + piece)
    sums = tl.load(state_ptr + 2 * PIECES + piece), tl.load(state_ptr + 3 * PIECES + piece)
    reference, sum_exp, centred, square = row_state.merged(fields[0], fields[1], sums[0], sums[1], scale)
    logp, entropy, score, lse, _, _ = row_state.statistics_of(
        reference, sum_exp, centred, square, z_target, scale, temperature
    )
    tl.store(out_ptr, logp)
    tl.store(out_ptr + 1, entropy)
    tl.store(out_ptr + 2, score)
    tl.store(out_ptr + 3, lse)


@triton.jit
def scalar_kernel(log1p_ptr, expm1_ptr, q_ptr, log_p_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(log1p_ptr + i, row_state.log1p(tl.load(q_ptr + i)))
    tl.store(expm1_ptr + i, row_state.expm1_of_log_probability(tl.load(log_p_ptr + i)))


def state(z: Tensor) -> list[float]:
    """Row state of logits without the target, from the definitions, in float64."""
    z = z[z > -math.inf].double()
    if z.numel() == 0:
        return [-math.inf, 0.0, 0.0, 0.0]
    t = (z - z.max()) * SCALE
    e = torch.exp2(t)
    return [float(z.max()), float(e.sum()), float((t * e).sum()), float((e * e).sum())]


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("target", [0, 60, 99])
def test_merged_pieces_are_the_whole(spread: float, target: int, device: torch.device) -> None:
    z = torch.randn(100) * spread
    z[20:40] = -math.inf  # covers one whole piece, which must weigh nothing
    pieces = [list(range(a, b)) for a, b in ((0, 1), (1, 20), (20, 40), (40, 100))]
    states = [state(z[[i for i in piece if i != target]]) for piece in pieces]
    packed = torch.tensor(states).T.contiguous().to(device)
    out = torch.empty(4, device=device)
    merge_kernel[(1,)](out, packed, float(z[target]), SCALE, TEMPERATURE, PIECES=4)
    rows, ids = z.double().view(1, 1, 100), torch.tensor([[target]])
    exact = reference.forward(rows, ids, None, temperature=TEMPERATURE, softcap=None, shift=False)
    torch.testing.assert_close(out.cpu().double(), torch.cat(exact).flatten(), rtol=2e-6, atol=2e-6)


def test_log1p_and_expm1_keep_small_arguments(device: torch.device) -> None:
    q = torch.logspace(-40, 2, 64)
    q[0] = 0.0
    log_p = -torch.logspace(-30, 3, 64)
    log_p[0] = -math.inf
    log_p[1] = 0.0
    out = torch.empty(2, 64, device=device)
    scalar_kernel[(1,)](out[0], out[1], q.to(device), log_p.to(device), N=64)
    torch.testing.assert_close(out[0].cpu().double(), torch.log1p(q.double()), rtol=3e-7, atol=0)
    torch.testing.assert_close(out[1].cpu().double(), torch.expm1(log_p.double()), rtol=3e-7, atol=0)
