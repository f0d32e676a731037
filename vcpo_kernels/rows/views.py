"""Row geometry: any logits view with a contiguous last dimension, seen as [outer, inner, V] without a copy."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check


def row_groups(logits: Tensor, keep_last: bool) -> list[tuple[int, int]]:
    """The batch dimensions of `logits` merged as far as their strides allow, as (size, stride) from outer to inner.

    keep_last: leave the innermost batch dimension on its own (a shifted row must know its position in the sequence).
    """
    groups: list[tuple[int, int]] = []
    for i in range(logits.dim() - 1):
        size, stride = logits.shape[i], logits.stride(i)
        last = keep_last and i == logits.dim() - 2
        if groups and not last and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        elif groups and not last and groups[-1][0] == 1:
            groups[-1] = (size, stride)
        elif size != 1 or last or not groups:
            groups.append((size, stride))
    return groups or [(1, logits.shape[-1])]


def as_rows(logits: Tensor, shift: bool) -> Tensor | None:
    """`logits` [.., V] as a view [outer, inner, V], or None where its strides need more than two batch dimensions.

    With `shift`, inner is the position in the sequence. Without, one group of rows comes as [1, N, V].
    """
    groups = row_groups(logits, keep_last=shift)
    if len(groups) == 1:
        groups = [(1, groups[0][0] * groups[0][1]), *groups]
    if len(groups) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = groups
    return logits.as_strided((outer, inner, logits.shape[-1]), (outer_stride, inner_stride, 1), logits.storage_offset())


def viewable(logits: Tensor, shift: bool) -> bool:
    """Whether one call can take the logits whole. A compiled graph always does, by a copy where it must."""
    return torch.compiler.is_compiling() or as_rows(logits, shift) is not None


def rows_of(logits: Tensor, shift: bool) -> Tensor:
    """`as_rows` inside an op: compiled graphs cannot take the public functions' way of one call per slice."""
    rows = as_rows(logits, shift)
    if rows is None:
        rows = as_rows(logits.contiguous(), shift)
    assert rows is not None
    return rows


@overload
def beside(value: Tensor, rows: Tensor) -> Tensor: ...
@overload
def beside(value: None, rows: Tensor) -> None: ...
def beside(value: Tensor | None, rows: Tensor) -> Tensor | None:
    """A token-sized tensor as contiguous [outer, inner], beside rows [outer, inner, V]."""
    return None if value is None else value.reshape(rows.shape[:2]).contiguous()


def check_ids(op: str, token_ids: Tensor, mask: Tensor | None, vocabulary: int, shift: bool) -> None:
    """On the CPU, a valid id [outer, inner] outside the vocabulary is an error; a GPU is not waited for."""
    if token_ids.device.type == "cpu":
        Check(op).vocabulary_ids(token_ids, valid_tokens(token_ids, mask, shift), vocabulary)


def valid_tokens(token_ids: Tensor, mask: Tensor | None, shift: bool) -> Tensor | None:
    """The entries that count: the mask's, without the first of each sequence where that has no prediction. None: all."""
    if not shift:
        return mask
    valid = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.clone()
    valid[..., :1] = False
    return valid
