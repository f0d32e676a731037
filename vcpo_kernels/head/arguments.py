"""Arguments of the head's ops: checks, dtypes, and what fake tensors need. The computing is in `_head.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.head.operands import stats_dtype


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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, float, float | None]:
    """The operands in one dtype, ids as int64, the mask as bool, the numbers as floats; or an error naming the argument."""
    check.tensor("hidden", hidden, checks.FLOAT_DTYPES)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise check.value_error(f"hidden must be [.., H] with H >= 1, got {checks.describe(hidden)}.")
    check.tensor("weight", weight, checks.FLOAT_DTYPES)
    if hasattr(weight, "full_tensor"):
        raise check.type_error(
            "weight is a DTensor, of which this rank holds a part. Pass weight.full_tensor(), or call inside the "
            "module whose forward gathers it."
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise check.value_error(
            f"weight must be [V, {hidden.shape[-1]}] (hidden.shape[-1]), got {checks.describe(weight)}. "
            "It is an nn.Linear's weight; one stored as [H, V] goes in as weight.T."
        )
    check.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check.tensor("bias", bias, checks.FLOAT_DTYPES)
        check.shape("bias", bias, weight.shape[:1], "weight.shape[0]")
        check.same_device("bias", bias, "hidden", hidden)
    check.tensor("token_ids", token_ids, checks.ID_DTYPES, "Convert it: token_ids.long().")
    fix = "With hidden[:, :-1] pass token_ids[:, 1:], or pass both whole with shift=True."
    check.shape("token_ids", token_ids, hidden.shape[:-1], "hidden.shape[:-1]", fix)
    check.same_device("token_ids", token_ids, "hidden", hidden)
    if mask is not None:
        mask = check.mask("mask", mask)
        check.shape("mask", mask, token_ids.shape, "token_ids.shape")
        check.same_device("mask", mask, "hidden", hidden)
    if shift and hidden.dim() < 2:
        raise check.value_error(f"shift=True wants hidden [.., T, H], got {checks.describe(hidden)}.")
    temperature = check.positive_float("temperature", temperature)
    softcap = check.optional_positive_float("softcap", softcap)
    hidden, weight, bias = _in_one_dtype(hidden, weight, bias)
    return hidden, weight, bias, token_ids.to(torch.int64), mask, temperature, softcap


def _in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As F.linear under autocast; else the dtype that torch promotes hidden and weight to. Casts carry gradients."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def needs_grad(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of them autograd will ask a gradient for."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t is not None and t.requires_grad for t in tensors)


def no_autocast(x: Tensor) -> torch.autocast:
    """Inside an op the dtypes are settled: autocast would cast fp32 operands, and miss the `out` they go to."""
    return torch.autocast(x.device.type, enabled=False)


# --- fakes -----------------------------------------------------------------------------------------------------------


def fake_statistics(hidden: Tensor, token_ids: Tensor, count: int) -> list[Tensor]:
    """`count` statistics in the shape of token_ids."""
    return [hidden.new_empty(token_ids.shape, dtype=stats_dtype(hidden.dtype)) for _ in range(count)]


def fake_rows(token_ids: Tensor, mask: Tensor | None, shift: bool) -> tuple[Any, Tensor]:
    """How many rows are computed (unknown where a mask says), and their entries."""
    if mask is None and not shift:
        return token_ids.numel(), token_ids.new_empty(0)
    rows: Any = torch.library.get_ctx().new_dynamic_size() if mask is not None else token_ids[..., 1:].numel()
    return rows, token_ids.new_empty(rows)


def fake_gradients(hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; [0] where not needed."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    d = [hidden.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)]
    return d[0], d[1], d[2]
