"""Argument checks shared by the public functions.

Every error names the function and the argument, says what it got, what it wants and how to fix it. Checks that
must read tensor data run only where that is free of a device synchronisation: on CPU tensors, outside a compiled graph.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ID_DTYPES = (torch.int64, torch.int32)


def describe(value: Any) -> str:
    """Short text for an error: a tensor by dtype, shape and device, anything else by its repr, cut short."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def tensor(where: str, name: str, value: Any, dtypes: Sequence[torch.dtype] | None = None, fix: str = "") -> None:
    """Raise unless `value` is a tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {describe(value)}. {fix}".rstrip())
    if dtypes is not None and value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{where}: {name} must be one of {wanted}, got {describe(value)}. {fix}".rstrip())


def shape(where: str, name: str, value: Tensor, want: Sequence[int], because: str, fix: str = "") -> None:
    """Raise unless `value` has exactly the shape `want`."""
    if tuple(value.shape) != tuple(want):
        raise ValueError(
            f"{where}: {name} must have shape {tuple(want)} ({because}), got {describe(value)}. {fix}".rstrip()
        )


def same_device(where: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors live on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{where}: {name} is on {value.device} but {other_name} is on {other.device}. "
            f"Move it: {name}.to({other_name}.device)."
        )


def positive_float(where: str, name: str, value: Any, optional: bool = False) -> float | None:
    """A finite float > 0 (or None where that is allowed), from any Python or numpy number.

    Tensors are refused, since reading them would synchronise.
    """
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        also = " or None" if optional else ""
        hint = f" Pass a Python number: float({name})." if isinstance(value, Tensor) else ""
        raise TypeError(f"{where}: {name} must be a float > 0{also}, got {describe(value)}.{hint}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{where}: {name} must be finite and > 0, got {value!r}.")
    return number


def integer(where: str, name: str, value: Any, minimum: int) -> int:
    """An int >= minimum, from a Python or numpy integer."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        hint = f" Pass a Python number: int({name})." if isinstance(value, Tensor) else ""
        raise TypeError(f"{where}: {name} must be an int >= {minimum}, got {describe(value)}.{hint}")
    if value < minimum:
        raise ValueError(f"{where}: {name} must be an int >= {minimum}, got {value!r}.")
    return value if isinstance(value, int) else int(value)


def boolean(where: str, name: str, value: Any) -> bool:
    """A bool, Python's or numpy's."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, Tensor) and hasattr(value, "item") and isinstance(value.item(), bool):
        return bool(value)
    raise TypeError(f"{where}: {name} must be a bool, got {describe(value)}.")


def vocabulary_ids(where: str, token_ids: Tensor, live: Tensor | None, vocabulary: int) -> None:
    """Raise unless every live id lies in [0, vocabulary). Reads the data: for `readable` tensors."""
    bad = (token_ids < 0) | (token_ids >= vocabulary)
    if live is not None:
        bad &= live
    if bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"{where}: token_ids must lie in [0, {vocabulary}) where the mask is true, got "
            f"{int(token_ids.flatten()[at])} at flat position {at} ({int(bad.sum())} such). "
            "Mask padding out (mask = token_ids != pad), or check that tokenizer and head agree on the vocabulary."
        )


def not_a_leaf(where: str, name: str, logits: Tensor) -> None:
    """Raise where an in-place gradient would take the place of a parameter's values."""
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            f"{where}: {name}=True would overwrite a leaf tensor's values with its gradient. "
            f"Pass logits that a module computed, or leave {name}=False."
        )


def choice(where: str, name: str, value: Any, options: Sequence[str]) -> None:
    """Raise unless `value` is one of the named options."""
    if value not in options:
        listed = ", ".join(repr(o) for o in options)
        raise ValueError(f"{where}: {name} must be one of {listed}, got {value!r}.")


def readable(value: Tensor) -> bool:
    """True where a check may look at the data: a real CPU tensor, not inside torch.compile."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def as_mask(where: str, name: str, value: Any) -> Tensor:
    """A bool mask from a bool, integer or 0/1 float one (trainers use all three). Any other value is refused."""
    tensor(where, name, value)
    if value.dtype == torch.bool:
        return value
    if value.is_complex():
        raise TypeError(f"{where}: {name} must be a bool, integer or 0/1 float tensor, got {describe(value)}.")
    mask = value != 0
    if readable(value) and not bool((mask == (value == 1)).all()):
        raise ValueError(
            f"{where}: {name} must hold only 0 and 1, got other values in {describe(value)}. "
            f"Token weights do not belong in the mask; multiply coefficients instead. Fix: ({name} > 0)."
        )
    return mask
