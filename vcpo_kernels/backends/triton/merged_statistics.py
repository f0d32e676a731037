"""merged_statistics on Triton: the states of W shards to each token's statistics, one launch.

Reads 20 W bytes a token and writes 28. Every rank adds in the order of the ranks, and so has the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcpo_kernels.backends.triton import row_loops, row_state
from vcpo_kernels.backends.triton.launch import FUSION, as_bytes, launches, on_device_of
from vcpo_kernels.rows import views
from vcpo_kernels.rows.shard_states import NUMBERS, MergedStatistics


@triton.jit(do_not_specialize=["shards", "tokens", "size"])
def merge_kernel(
    states_ptr,  # [W, 5, N] fp32
    ids_ptr,  # [N] int64
    valid_ptr,  # [N] uint8, or None
    merged_ptr,  # [7, N] fp32
    shards,  # W
    tokens,  # N
    size,
    temperature,
    softcap,  # or None
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    scale = row_state.LOG2_E / temperature
    minus_inf = float("-inf")
    top = tl.zeros([BLOCK], dtype=tl.float32) + minus_inf
    target_logit = top
    at = states_ptr + token
    for _ in range(shards):
        top = tl.maximum(top, tl.load(at, mask=inside, other=minus_inf))
        z = tl.load(at + 4 * tokens, mask=inside, other=minus_inf)
        target_logit = tl.where((z > target_logit) | (z != z), z, target_logit)
        at += 5 * tokens
    sum_exp = tl.zeros([BLOCK], dtype=tl.float32)
    sum_centred, sum_sq = sum_exp, sum_exp
    at = states_ptr + token
    for _ in range(shards):
        reference = tl.load(at, mask=inside, other=minus_inf)
        e, centred, sq = row_state.rebased(
            reference,
            tl.load(at + tokens, mask=inside, other=0.0),
            tl.load(at + 2 * tokens, mask=inside, other=0.0),
            tl.load(at + 3 * tokens, mask=inside, other=0.0),
            top,
            scale,
        )
        sum_exp, sum_centred, sum_sq = sum_exp + e, sum_centred + centred, sum_sq + sq
        at += 5 * tokens
    logp, entropy, score, lse, peak, log_total = row_state.statistics_of(
        top, sum_exp, sum_centred, sum_sq, row_loops.capped(target_logit, softcap), scale, temperature
    )
    ids = tl.load(ids_ptr + token, mask=inside, other=0)
    known = (ids >= 0) & (ids < size)
    valid = inside
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + token, mask=inside, other=0) != 0
    nan = float("nan")
    store(merged_ptr + token, tl.where(known, logp, nan), valid, inside)
    store(merged_ptr + tokens + token, entropy, valid, inside)
    store(merged_ptr + 2 * tokens + token, tl.where(known, score, nan), valid, inside)
    store(merged_ptr + 3 * tokens + token, lse, valid, inside)
    store(merged_ptr + 4 * tokens + token, target_logit, valid, inside)
    store(merged_ptr + 5 * tokens + token, peak, valid, inside)
    store(merged_ptr + 6 * tokens + token, log_total, valid, inside)


@triton.jit
def store(ptr, value, valid, inside):
    """0 where the token does not count."""
    tl.store(ptr, tl.where(valid, value, 0.0), mask=inside)


def forward(
    states: Tensor,  # [W, 5, ..] fp32
    token_ids: Tensor,  # [..] int64
    mask: Tensor | None,  # [..] bool
    size: int,
    *,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> MergedStatistics:
    """Each in the shape of token_ids, see the reference."""
    assert states.shape[1] == NUMBERS
    out = torch.empty((len(MergedStatistics._fields), *token_ids.shape), dtype=states.dtype, device=states.device)
    tokens = token_ids.numel()
    valid = views.valid_tokens(token_ids, mask, shift)
    launch = launches(states.device).sequence
    if tokens:
        with on_device_of(states):
            merge_kernel[(triton.cdiv(tokens, launch.block),)](
                states.contiguous(), token_ids.contiguous(), as_bytes(valid), out, len(states), tokens, size,
                temperature, softcap, BLOCK=launch.block, num_warps=launch.num_warps, enable_fp_fusion=FUSION,
            )  # fmt: skip
    return MergedStatistics(*out.unbind(0))
