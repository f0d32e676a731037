"""Argument checks shared by the public functions.

Every error names the function and the argument, says what it got, what it wants and how to fix it. Checks that
must read tensor data run only where that is free of a device synchronisation: on CPU tensors, outside a compiled graph.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import scalars

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ID_DTYPES = (torch.int64, torch.int32)
_PLAIN = (Tensor, torch.nn.Parameter)
_TRANSPARENT = ("torch._subclasses.", "torch.distributed._functional_collectives")
LARGEST = sys.float_info.max  # torch.compile compares numbers with it, where math.isfinite would break the graph


def describe(value: Any) -> str:
    """Short text for an error: a tensor or array by dtype and shape, what holds tensors by its fields, else the repr, cut."""
    if isinstance(value, Tensor):
        kind = "tensor" if type(value) in _PLAIN else type(value).__name__
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} of shape {tuple(value.shape)} on {value.device}"
    if _is_array(value) and torch.compiler.is_compiling():  # which cannot name a dtype
        return (
            "a numpy number or array, of which torch.compile makes a tensor: pass float(...) to the compiled function"
        )
    if _is_array(value):
        return f"a {value.dtype} {type(value).__name__} of shape {tuple(value.shape)} ({type(value).__module__})"
    if fields := _tensor_fields(value):
        return f"{type(value).__name__} with {', '.join(fields)}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return f"a {type(value).__name__} of {len(value)} tensors"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _is_array(value: Any) -> bool:
    """numpy's and its like, told without importing them."""
    return hasattr(value, "__array__") and hasattr(value, "dtype") and hasattr(value, "shape")


def _tensor_fields(value: Any) -> dict[str, str]:
    """Name -> how it is written after the object, of the tensors in a mapping (a batch), a dataclass or a named tuple; a
    model's output is mapping and dataclass, and written as the latter.
    """
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    elif isinstance(value, tuple):
        names = list(getattr(value, "_fields", ()))
    elif isinstance(value, Mapping):
        return {k: f"[{k!r}]" for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    else:
        names = []
    return {name: f".{name}" for name in names if isinstance(getattr(value, name, None), Tensor)}


# The field that was meant, where an argument's own name is none.
MEANT = {
    "hidden": ("last_hidden_state",),
    "token_ids": ("input_ids", "ids"),
    "mask": ("attention_mask",),
}


def as_tensor_hint(name: str, value: Any) -> str:
    """How to make the tensor out of what was given instead; empty where that is anybody's guess."""
    if value is None:
        return f"Fix: give {name} a tensor."
    name = name if name.replace(".", "").isidentifier() else "..."
    if _is_array(value):
        made = "torch.from_numpy" if type(value).__module__ == "numpy" else "torch.as_tensor"
        return f"Fix: {made}({name})."
    fields = _tensor_fields(value)
    for field in (name, *MEANT.get(name, ())):
        if field in fields:
            return f"Fix: pass its tensor, {name}{fields[field]}."
    if fields:
        return f"Fix: pass the tensor that is meant of its {', '.join(fields)}."
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(entry, Tensor) for entry in value):
            return f"Fix: torch.stack({name}), or torch.nn.utils.rnn.pad_sequence where lengths differ."
        if all(isinstance(entry, (bool, int, float, list, tuple)) for entry in value):
            return f"Fix: torch.as_tensor({name})."
    if isinstance(value, (int, float)):
        return f"Fix: torch.as_tensor({name})."
    return ""


def is_dtensor(value: Any) -> bool:
    """Without an import of torch.distributed.tensor. By the class: of a value torch.compile says that it has no such name."""
    return hasattr(type(value), "full_tensor")


def is_sharded(value: Tensor) -> bool:
    """Whether this rank holds a part of it alone: a DTensor, or what ZeRO-3 or FSDP leaves of a parameter between forwards."""
    return is_dtensor(value) or _is_partitioned(value) or _is_freed(value)


def _is_partitioned(value: Tensor) -> bool:
    return hasattr(value, "ds_id") and value.numel() == 0


def _is_freed(value: Tensor) -> bool:
    """Entries without memory behind them, which no kernel may touch."""
    if torch.compiler.is_compiling() or value.device.type not in ("cpu", "cuda") or value.layout != torch.strided:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return not wrapped and value.numel() > 0 and value.untyped_storage().nbytes() == 0


def _is_own_arithmetic(value: Tensor) -> bool:
    """A subclass whose values are not what lies in its memory. Not those of torch's tracers, nor one awaiting its values."""
    kind = type(value)
    if kind in _PLAIN or kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    return not kind.__module__.startswith(_TRANSPARENT)


def readable(value: Tensor) -> bool:
    """True where a check may look at the data: a real CPU tensor, not inside torch.compile."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _whole(name: str) -> str:
    """How to have all of a DTensor, with the right gradient: that of a whole copy is taken for every rank's own."""
    if "weight" in name or "bias" in name:
        return (
            "Call inside the forward of the module that gathers it (FSDP2), or pass weight.full_tensor(grad_placements="
            '[Partial("avg")]) where each rank has its own tokens, weight.full_tensor() where all have the same (tensor '
            "parallelism)."
        )
    return (
        f"Pass {name}.full_tensor() where every rank has the same tokens, or {name}.to_local() beside this rank's part of the "
        "other arguments where it is sharded by tokens."
    )


def overlaps(value: Tensor) -> bool:
    """Whether two entries may share memory: each dimension, from the densest on, must step past all that lies within it."""
    if value.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(
        (stride, size) for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def has_float64(device_type: str) -> bool:
    """Whether a kind of device computes in float64, which sums over tokens and sequences are kept in."""
    return device_type in ("cpu", "cuda", "meta") or _makes_float64(device_type)


@functools.cache
def _makes_float64(device_type: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


class Check:
    """The checks of one function, which its errors begin with.

    >>> from vcpo_kernels.core.checks import Check
    >>> Check("token_stats").positive_float("temperature", 0.7)
    0.7
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def value_error(self, message: str) -> ValueError:
        """To be raised: `message` after the function's name."""
        return ValueError(f"{self.where}: {message}".rstrip())

    def type_error(self, message: str) -> TypeError:
        """To be raised: `message` after the function's name."""
        return TypeError(f"{self.where}: {message}".rstrip())

    def runtime_error(self, message: str) -> RuntimeError:
        """To be raised: `message` after the function's name."""
        return RuntimeError(f"{self.where}: {message}".rstrip())

    def tensor(self, name: str, value: Any, dtypes: Sequence[torch.dtype] | None = None, fix: str = "") -> None:
        """Raise unless `value` is a tensor of one of `dtypes`."""
        if not isinstance(value, Tensor):
            hint = as_tensor_hint(name, value) or fix
            raise self.type_error(f"{name} must be a torch.Tensor, got {describe(value)}. {hint}")
        self.plain(name, value)
        if dtypes is not None and value.dtype not in dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise self.type_error(f"{name} must be one of {wanted}, got {describe(value)}. {fix}")

    def plain(self, name: str, value: Tensor) -> None:
        """Raise unless all values of a tensor are on this rank, in memory, as its dtype and strides say."""
        if is_dtensor(value):
            raise self.type_error(f"{name} is a DTensor, of which this rank holds a part. {_whole(name)}")
        if _is_partitioned(value):
            whole = tuple(getattr(value, "ds_shape", ()))
            raise self.type_error(
                f"{name} is DeepSpeed ZeRO-3's, of whole shape {whole}, not gathered on this rank. Call inside the forward of "
                f"the module that it belongs to, or under deepspeed.zero.GatheredParameters."
            )
        if _is_freed(value):
            raise self.type_error(
                f"{name}, {describe(value)}, has no memory: FSDP has freed it until a forward gathers it. Call inside the "
                "forward of the module that it belongs to, or keep it (reshard_after_forward=False)."
            )
        if _is_own_arithmetic(value):
            raise self.type_error(
                f"{name} is a tensor subclass, {type(value).__module__}.{type(value).__qualname__} (quantised, nested or "
                f"masked?), whose values the kernels cannot read. Pass a plain torch.Tensor, such as {name}.dequantize(), "
                "or leave the module out of quantisation."
            )
        if value.layout != torch.strided:
            raise self.type_error(f"{name} has layout {value.layout}, wanted a strided tensor. Pass {name}.to_dense().")

    def float64(self, name: str, value: Tensor) -> None:
        """Raise on a device that has no float64 (Apple's MPS): no sum over tokens or sequences can be kept there."""
        if not has_float64(value.device.type):
            raise self.type_error(
                f"{name} is on {value.device}, which has no float64, and sums over tokens and sequences are kept in it. "
                f"Move it: {name}.cpu()."
            )

    def shape(self, name: str, value: Tensor, want: Sequence[int], because: str, fix: str = "") -> None:
        """Raise unless `value` has exactly the shape `want`."""
        if tuple(value.shape) != tuple(want):
            raise self.value_error(f"{name} must have shape {tuple(want)} ({because}), got {describe(value)}. {fix}")

    def same_device(self, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
        """Raise unless two tensors live on one device."""
        if value.device != other.device:
            raise self.value_error(
                f"{name} is on {value.device} but {other_name} is on {other.device}. "
                f"Move it: {name}.to({other_name}.device)."
            )

    def _traced(self, name: str, value: Any) -> float:
        """A number under torch.compile. One that changes there marks the graph, whatever it is for (`core/changing.py`)."""
        if not isinstance(value, (int, float)) and _is_array(value):
            raise self.type_error(f"{name} must be a number, got {describe(value)}.")
        number = float(value)
        scalars.number(number)
        return number

    def positive_float(self, name: str, value: Any) -> float:
        """A finite float > 0, from any Python or numpy number. Tensors are refused: reading them would synchronise."""
        return self._positive_float(name, value, "a float > 0")

    def optional_positive_float(self, name: str, value: Any) -> float | None:
        """As `positive_float`, or None."""
        return None if value is None else self._positive_float(name, value, "a float > 0 or None")

    def _positive_float(self, name: str, value: Any, wanted: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
            hint = f" Pass a Python number: float({name})." if isinstance(value, Tensor) else ""
            raise self.type_error(f"{name} must be {wanted}, got {describe(value)}.{hint}")
        number = self._traced(name, value) if torch.compiler.is_compiling() else float(value)
        if not 0 < number <= LARGEST:
            raise self.value_error(f"{name} must be finite and > 0, got {value!r}.")
        return number

    def finite_float(self, name: str, value: Any, minimum: float = -math.inf) -> float:
        """A finite float >= minimum."""
        if isinstance(value, (bool, Tensor)) or not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
            raise self.type_error(f"{name} must be a number, got {describe(value)}.")
        number = self._traced(name, value) if torch.compiler.is_compiling() else float(value)
        if not max(minimum, -LARGEST) <= number <= LARGEST:
            bound = f" and >= {minimum:g}" if minimum > -math.inf else ""
            raise self.value_error(f"{name} must be finite{bound}, got {value!r}.")
        return number

    def integer(self, name: str, value: Any, minimum: int) -> int:
        """An int >= minimum, from a Python or numpy integer."""
        if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
            hint = f" Pass a Python number: int({name})." if isinstance(value, Tensor) else ""
            raise self.type_error(f"{name} must be an int >= {minimum}, got {describe(value)}.{hint}")
        if value < minimum:
            raise self.value_error(f"{name} must be an int >= {minimum}, got {value!r}.")
        return value if isinstance(value, int) else int(value)

    def boolean(self, name: str, value: Any) -> bool:
        """A bool, Python's or numpy's."""
        if isinstance(value, bool):
            return value
        if not isinstance(value, Tensor) and hasattr(value, "item") and isinstance(value.item(), bool):
            return bool(value)
        raise self.type_error(f"{name} must be a bool, got {describe(value)}.")

    def choice(self, name: str, value: Any, options: Sequence[str]) -> None:
        """Raise unless `value` is one of the named options."""
        if value not in options:
            raise self.value_error(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}.")

    def mask(self, name: str, value: Any) -> Tensor:
        """A bool mask from a bool, integer or 0/1 float one (trainers use all three). Any other value is refused."""
        self.tensor(name, value)
        if value.dtype == torch.bool:
            return value
        if value.is_complex():
            raise self.type_error(f"{name} must be a bool, integer or 0/1 float tensor, got {describe(value)}.")
        mask = value != 0
        if readable(value) and not bool((mask == (value == 1)).all()):
            raise self.value_error(
                f"{name} must hold only 0 and 1, got other values in {describe(value)}. "
                f"Token weights do not belong in the mask; multiply coefficients instead. Fix: ({name} > 0)."
            )
        return mask

    def vocabulary_ids(self, token_ids: Tensor, valid: Tensor | None, vocabulary: int) -> None:
        """Raise unless every valid id lies in [0, vocabulary). Reads the data: for `readable` tensors."""
        bad = (token_ids < 0) | (token_ids >= vocabulary)
        if valid is not None:
            bad &= valid
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            raise self.value_error(
                f"token_ids must lie in [0, {vocabulary}) where the mask is true, got "
                f"{int(token_ids.flatten()[at])} at flat position {at} ({int(bad.sum())} such). "
                "Mask padding out (mask = token_ids != pad), or check that tokenizer and head agree on the vocabulary."
            )

    def overwritable(self, name: str, logits: Tensor) -> None:
        """Raise where an in-place gradient would take the place of a parameter's values, or of other entries' gradients."""
        compiling = torch.compiler.is_compiling()  # where nothing is written in place
        base = logits if compiling or logits._base is None else logits._base
        if logits.requires_grad and base.is_leaf and base.requires_grad:
            through = "" if base is logits else ", of which logits are a view,"
            raise self.value_error(
                f"{name}=True would overwrite a leaf tensor's values{through} with its gradient. "
                f"Pass logits that a module computed, or leave {name}=False."
            )
        if not compiling and overlaps(logits):
            raise self.value_error(
                f"{name}=True would write several entries' gradients to one memory location: logits of shape "
                f"{tuple(logits.shape)} have strides {logits.stride()} (expand, unfold, as_strided). "
                f"Pass logits.clone(), or leave {name}=False."
            )
