"""TracedLogits: stands in for a head's logits while a model's forward runs, and notes what is done to them.

Layer: rows. Numbers put in the logits' place would show what becomes of these numbers, at one size, at one position. What is
noted here are the operations, in every forward: each is one that the fused head does as well, or an error by name.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vcpo_kernels.core import checks
from vcpo_kernels.parallel.shards import is_sharded_in


class TracedLogits:
    """logits [.., V] = before * z, or after * tanh(before * z); z = hidden @ weight[entries].T + bias.

    hidden: [.., H], with the leading dimensions of the logits. bias: factor * the head's own [entries] + added.
    declared: the numbers that logits may be multiplied with or divided by.
    """

    def __init__(
        self,
        owner: str,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        declared: Sequence[float],
    ) -> None:
        self._owner, self._declared, self._head_dtype, self._head_bias = owner, declared, dtype, bias is not None
        self.hidden, self.entries = hidden, slice(0, len(weight))
        self.added: Tensor | None = None
        self.factor: Tensor | None = None
        self.before, self.after, self._capped = Fraction(1), Fraction(1), False
        self.dtype, self.device = dtype, hidden.device
        self._shares_memory = False
        self._columns: tuple[Tensor | None, ...] = (None,)  # of the weight: the head's own (None) and adapters' [V, r]

    @staticmethod
    def adapter(owner: str, hidden: Tensor, weight: Tensor) -> TracedLogits:
        """What a low-rank adapter adds to a head's logits, once it is scaled by whatever number."""
        logits = TracedLogits(owner, hidden, weight, None, _promoted(hidden.dtype, weight), ())
        logits._columns = (weight,)
        return logits

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.entries.stop - self.entries.start))

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    def softcap_and_scale(self) -> tuple[float | None, float]:
        """logits = softcap(scale * z): after * tanh(before z) = c tanh(s z / c) with c = after, s = before * after."""
        if not self._capped:
            return None, float(self.before)
        return float(self.after), float(self.before * self.after)

    def of_head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The head's weight and bias as these logits use them; the very same, where nothing was done to them."""
        if self._is_adapter:
            raise self._refused("an adapter alone")
        if len(self._columns) > 1:
            weight = torch.cat([weight if c is None else c.to(weight.dtype) for c in self._columns], 1)
        if self.entries != slice(0, len(weight)):
            weight = weight[self.entries]
            bias = None if bias is None else bias[self.entries]
        if bias is not None and self.factor is not None:
            bias = bias * self.factor.to(bias.dtype)
        if self.added is None:
            return weight, bias
        added = self.added.to(weight.dtype)
        return weight, added if bias is None else bias + added

    def of_shared_head(self, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
        """The same of a weight of which this rank has some rows, the others of its mesh the rest, for the same tokens."""
        if not is_sharded_in(weight, 0):
            raise RuntimeError(
                f"patch_head: the head's weight is a DTensor with placements {weight.placements}, wanted one split once, by "
                "its rows (ColwiseParallel). Use token_stats on the model's logits."
            )
        hidden: Any = self.hidden
        if not checks.is_dtensor(hidden) or hidden.device_mesh != weight.device_mesh:
            raise RuntimeError(
                "patch_head: the head's weight is a DTensor, of which this rank has a part, and nothing says that the other "
                "ranks have the same tokens. Under tensor parallelism put the head into the plan (ColwiseParallel); under "
                "FSDP2 call the module that fully_shard was given, and patch a model inside of it."
            )
        if self._is_adapter or len(self._columns) > 1 or self.entries != slice(0, len(weight)):
            raise self._refused("an adapter or a slice, where ranks share its vocabulary,")
        if self.added is not None or (bias is not None and self.factor is not None):
            raise self._refused("a bias of its own, where ranks share its vocabulary,")
        return weight, bias

    # --- what a model may call -----------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        traced = next(a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, cls))
        if not any(a is traced for a in args):  # in a list, or by keyword
            raise traced._refused(name)
        if args[0] is not traced and (name not in COMMUTE or len(args) != 2):
            raise traced._refused(f"{name} of another tensor")
        return traced._applied(name, *(a for a in args if a is not traced), **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"logits have no attribute {name!r}")
        if not callable(getattr(Tensor, name)):
            raise self._refused(f".{name}")
        return functools.partial(self._applied, name)

    # Tensor parallelism's after the head: statistics are of whole rows, wherever their entries are.
    placements = None

    def redistribute(self, *layout: Any, **options: Any) -> TracedLogits:
        return self

    def to_local(self, **options: Any) -> TracedLogits:
        return self

    def _applied(self, name: str, *args: Any, **kwargs: Any) -> Any:
        rule = RULES.get(name)
        if rule is None:
            raise self._refused(name)
        try:
            result = rule(self, *args, **kwargs)
        except TypeError as error:  # an option of the operation that its rule does not have
            raise self._refused(name) from error
        if result is NotImplemented:
            raise self._refused(name)
        return result

    def _refused(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"patch_head: {self._owner} applies {what} to its logits, which the fused head does not do. It knows factors "
            "that the config names, softcap c tanh(z / c), an added [V] bias, slices, other leading dimensions, and casts "
            "to a dtype no narrower than the head's. Use token_stats on the model's logits."
        )

    def _but(self, **changes: Any) -> TracedLogits:
        other = object.__new__(TracedLogits)
        other.__dict__.update(self.__dict__, _shares_memory=False)
        other.__dict__.update(changes)
        return other

    def _view(self, **changes: Any) -> TracedLogits:
        """In place neither of the two may be written from here on."""
        self._shares_memory = True
        return self._but(**changes, _shares_memory=True)

    # --- arithmetic ----------------------------------------------------------------------------------------------------

    def _multiplied(self, other: Any) -> Any:
        return self._folded(other) if isinstance(other, Tensor) else self._scaled(other, inverse=False)

    def _divided(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return self._scaled(other, inverse=True)
        return self._folded(other.reciprocal()) if other.is_floating_point() else NotImplemented

    def _scaled(self, other: Any, inverse: bool) -> Any:
        if isinstance(other, bool) or not isinstance(other, numbers.Real):
            return NotImplemented
        number = float(other)
        if self._is_adapter:
            return self._but(hidden=self.hidden / number if inverse else self.hidden * number)
        if number != 1 and not any(math.isclose(number, d) or math.isclose(number * d, 1) for d in self._declared):
            step = f"z / {number:g}" if inverse else f"{number:g} z"
            raise RuntimeError(
                f"patch_head: {self._owner} turns logits z into {step}, which is none of the known factors "
                f"({', '.join(f'{d:g}' for d in self._declared) or 'none'} by its config). Declare it there, as "
                "config.logit_scale, or use token_stats on its logits."
            )
        factor = 1 / Fraction(number) if inverse else Fraction(number)
        return self._but(after=self.after * factor) if self._capped else self._but(before=self.before * factor)

    def _folded(self, other: Tensor) -> Any:
        """One number, or one a row: as well multiplied into hidden, where it takes its gradient too."""
        if self._capped or not other.is_floating_point() or (other.dim() > 0 and other.device != self.device):
            return NotImplemented
        dtype = _promoted(self.dtype, other)
        if other.numel() == 1 and other.dim() <= self.ndim:
            one = other.reshape(())
            return self._but(
                hidden=(self.hidden * one).to(self.hidden.dtype),
                factor=one if self.factor is None else self.factor * one,
                added=None if self.added is None else self.added * one,
                dtype=dtype,
            )
        if self._head_bias or self.added is not None or not _by_row(other, self.shape):
            return NotImplemented
        return self._but(hidden=(self.hidden * other).to(self.hidden.dtype), dtype=dtype)

    @property
    def _is_adapter(self) -> bool:
        return None not in self._columns

    def _adapted(self, other: TracedLogits) -> Any:
        """The sum of two linear maps is one of both inputs side by side."""
        head, adapter = (other, self) if self._is_adapter else (self, other)
        changed = head._capped or adapter._capped or head.before != 1 or head.entries != adapter.entries
        if changed or not adapter._is_adapter or head.hidden.shape[:-1] != adapter.hidden.shape[:-1]:
            return NotImplemented
        return head._but(
            hidden=torch.cat([head.hidden, adapter.hidden.to(head.hidden.dtype)], -1),
            dtype=torch.promote_types(head.dtype, adapter.dtype),
            _columns=(*head._columns, *adapter._columns),
        )

    def _plus(self, other: Any) -> Any:
        """A bias by entry, or what an adapter adds."""
        if isinstance(other, TracedLogits):
            return self._adapted(other)
        if (
            self._capped
            or not isinstance(other, Tensor)
            or not other.is_floating_point()
            or other.device != self.device
        ):
            return NotImplemented
        width = self.shape[-1]
        if not 0 < other.dim() <= self.ndim or other.shape[-1] != width or other.numel() != width:
            return NotImplemented
        bias = other.reshape(width) / float(self.before)
        return self._but(added=bias if self.added is None else self.added + bias, dtype=_promoted(self.dtype, other))

    def _minus(self, other: Any) -> Any:
        return self._plus(-other) if isinstance(other, Tensor) else NotImplemented

    def _cap(self) -> Any:
        return NotImplemented if self._capped else self._but(_capped=True)

    # --- what changes no number ----------------------------------------------------------------------------------------

    def _cast(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        dtype = self.dtype if dtype is None else dtype
        if device is not None and torch.empty(0, device=device).device != self.device:
            return NotImplemented
        if torch.promote_types(dtype, self._head_dtype) != dtype:
            raise self._refused(f"a cast to {dtype}, which rounds,")
        return self if dtype == self.dtype else self._but(dtype=dtype)

    def _indexed(self, index: Any) -> Any:
        """Of the vocabulary's entries, those from one to another; of the leading dimensions, anything."""
        index = list(index) if isinstance(index, tuple) else [index]
        if not all(_selects_positions(i) for i in index):
            return NotImplemented
        used = sum(i is not None and i is not Ellipsis for i in index)
        if used < self.ndim and not any(i is Ellipsis for i in index):
            index.append(Ellipsis)
        at = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
        index[at : at + 1] = [slice(None)] * (self.ndim - used)
        if not isinstance(index[-1], slice):
            return NotImplemented
        start, stop, step = index[-1].indices(self.shape[-1])
        if step != 1 or stop <= start:
            return NotImplemented
        leading = (*index[:-1], slice(None))
        return self._view(
            hidden=self.hidden[leading],
            entries=slice(self.entries.start + start, self.entries.start + stop),
            added=None if self.added is None else self.added[start:stop],
        )

    def _reshaped(self, *shape: Any) -> Any:
        new = torch.empty(self.shape, device="meta").reshape(*shape).shape
        if new[-1:] != self.shape[-1:]:
            return NotImplemented
        return self._view(hidden=self.hidden.reshape(*new[:-1], self.hidden.shape[-1]))

    def _size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]


def _promoted(dtype: torch.dtype, other: Tensor) -> torch.dtype:
    return torch.result_type(torch.empty(1, dtype=dtype, device=other.device), other)


def _by_row(other: Tensor, shape: torch.Size) -> bool:
    """Whether [.., 1] has a number for each row of `shape` [.., V], and makes it no larger."""
    sizes = zip(reversed(other.shape), reversed(shape), strict=False)
    return 0 < other.dim() <= len(shape) and other.shape[-1] == 1 and all(n in (1, size) for n, size in sizes)


def _selects_positions(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dtype in checks.ID_DTYPES
    return index is None or index is Ellipsis or (isinstance(index, (int, slice)) and not isinstance(index, bool))


def _in_place(rule: Callable[..., Any]) -> Callable[..., Any]:
    def write(traced: TracedLogits, *args: Any) -> Any:
        result = NotImplemented if traced._shares_memory else rule(traced, *args)
        if result is NotImplemented or result.dtype != traced.dtype:
            return NotImplemented
        traced.__dict__.update(result.__dict__)
        return traced

    return write


_T = TracedLogits
COMMUTE = ("mul", "multiply", "add")
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _T._multiplied),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), _T._divided),
    **dict.fromkeys(("add", "__add__", "__radd__"), _T._plus),
    **dict.fromkeys(("sub", "subtract", "__sub__"), _T._minus),
    **dict.fromkeys(("mul_", "multiply_", "__imul__"), _in_place(_T._multiplied)),
    **dict.fromkeys(("div_", "divide_", "true_divide_", "__itruediv__"), _in_place(_T._divided)),
    **dict.fromkeys(("add_", "__iadd__"), _in_place(_T._plus)),
    **dict.fromkeys(("to", "type"), _T._cast),
    **dict.fromkeys(("view", "reshape"), _T._reshaped),
    "tanh": _T._cap,
    "tanh_": _in_place(_T._cap),
    "float": lambda traced: traced._cast(torch.float32),
    "double": lambda traced: traced._cast(torch.float64),
    "half": lambda traced: traced._cast(torch.float16),
    "bfloat16": lambda traced: traced._cast(torch.bfloat16),
    "type_as": lambda traced, other: traced._cast(other.dtype),
    "contiguous": lambda traced: traced,
    "is_contiguous": lambda traced: True,
    "clone": lambda traced: traced._but(),
    "__getitem__": _T._indexed,
    "size": _T._size,
    "dim": lambda traced: traced.ndim,
    "numel": lambda traced: traced.shape.numel(),
    "is_floating_point": lambda traced: True,
}
_OPERATORS = (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv mod pow rpow matmul rmatmul neg pos abs "
    "lt le gt ge getitem setitem bool float int"
)


def _operator(name: str) -> Callable[..., Any]:
    return lambda traced, *args: traced._applied(name, *args)


for _name in (f"__{name}__" for name in _OPERATORS.split()):  # Python looks these up on the class alone
    setattr(TracedLogits, _name, _operator(_name))
