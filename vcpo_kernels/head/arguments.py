"""Arguments of the head's public functions: checks and dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.head.operands import HeadInputs
from vcpo_kernels.parallel.shards import VocabularyShard
from vcpo_kernels.rows.token_stats import checked_tokens

# A GEMM's logits are good to some ulps, and the lean backward has log p from statistics in fp32: logits of size z leave
# log p an error of about 1e-7 z / temperature.
LEAST_TEMPERATURE = 1e-3


def checked(
    check: Check,
    hidden: Any,
    weight: Any,
    token_ids: Any,
    bias: Any,
    mask: Any,
    temperature: Any,
    softcap: Any,
    shift: bool,
    shard: VocabularyShard | None = None,
) -> HeadInputs:
    """The operands in one dtype, ids as int64, the mask as bool, the numbers as floats; or an error naming the argument."""
    check.tensor("hidden", hidden, checks.FLOAT_DTYPES)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise check.value_error(f"hidden must be [.., H] with H >= 1, got {checks.describe(hidden)}.")
    if shard is None and checks.is_dtensor(weight) and not checks.is_dtensor(hidden):
        raise ambiguous(check)
    check.tensor("weight", weight, checks.FLOAT_DTYPES)
    if weight.dim() != 2 or (weight.shape[0] == 0 and shard is None) or weight.shape[1] != hidden.shape[-1]:
        raise check.value_error(
            f"weight must be [V, {hidden.shape[-1]}] (hidden.shape[-1]), got {checks.describe(weight)}. "
            "It is an nn.Linear's weight; one stored as [H, V] goes in as weight.T. Of FSDP's or ZeRO's flat part of it the "
            "whole is there in the forward of the module that it belongs to."
        )
    check.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check.tensor("bias", bias, checks.FLOAT_DTYPES)
        check.shape("bias", bias, weight.shape[:1], "weight.shape[0]")
        check.same_device("bias", bias, "hidden", hidden)
    ids, mask, temperature, softcap = checked_tokens(
        check, "hidden", "H", hidden, token_ids, mask, temperature, softcap, shift
    )
    operands = _in_one_dtype(hidden, weight, bias)
    if temperature < LEAST_TEMPERATURE and operands[0].dtype != torch.float64:
        raise check.value_error(
            f"temperature must be at least {LEAST_TEMPERATURE:g}, got {temperature:g}, by which the rounding of "
            "hidden @ weight.T is divided. Pass float64 operands, or make the logits and give them to token_stats or "
            "weighted_logp, which take them as exact."
        )
    return HeadInputs(*operands, ids, mask, temperature, softcap, shift)


def ambiguous(check: Check) -> TypeError:
    """To be raised: nothing says whether the ranks of a sharded weight have other tokens, or the same."""
    return check.type_error(
        "weight is a DTensor, of which this rank holds a part, and hidden is a plain tensor. Where all ranks have the same "
        "tokens (tensor parallelism), pass vocabulary=VocabularyShard.of_dtensor(weight, 0), or hidden as the DTensor that it "
        "came from. Where each has its own (FSDP2), call inside the forward of the module that gathers it, or pass "
        'weight.full_tensor(grad_placements=[Partial("avg")]).'
    )


def _in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As F.linear under autocast; else the dtype that torch promotes hidden and weight to. Casts carry gradients."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
