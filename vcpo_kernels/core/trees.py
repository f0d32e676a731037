"""Results that are dataclasses of tensors: pytrees, which FSDP2, torch.compile and functorch map over, and movable."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch.utils import _pytree as pytree

Self = TypeVar("Self", bound="TensorTree")


class TensorTree:
    """Base of a frozen dataclass whose fields are tensors, None or dicts of tensors, but for those named in STATIC."""

    STATIC: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(cls, _children, functools.partial(_rebuilt, cls))

    def to(self: Self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """The same with every tensor on `device`."""
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=non_blocking), self)


def _children(tree: Any) -> tuple[list[Any], Any]:
    values = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    static = tuple(values.pop(name) for name in tree.STATIC)
    return list(values.values()), (tuple(values), static)


def _rebuilt(cls: Any, children: Iterable[Any], context: Any) -> Any:
    names, static = context
    return cls(**dict(zip(names, children, strict=True)), **dict(zip(cls.STATIC, static, strict=True)))
