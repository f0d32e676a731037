"""The operands of the language-model head: what a call is given, and the rows of it that are computed.

Layer: rows. Rows outside the mask are gathered away before the first GEMM; what comes back is scattered to its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.rows import views

# As the ops' schemas have HeadInputs' tensors and Needs.
OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask"
NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"


class Needs(NamedTuple):
    """Which operands a gradient is wanted of."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def parameters(self) -> bool:
        return self.weight or self.bias


@dataclass(frozen=True)
class Head:
    """The M rows of a call that are computed.

    hidden [M, H]; weight [V, H]; bias [V] or None; token_ids [M] int64; mask [M] bool, only where rows that do not count
    had to be left in.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    mask: Tensor | None
    temperature: float
    softcap: float | None

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def settings(self) -> dict[str, Any]:
        """What every row kernel takes."""
        return {"temperature": self.temperature, "softcap": self.softcap, "shift": False}

    def logits(self, out: Tensor, rows: slice = slice(None), entries: slice = slice(None)) -> Tensor:
        """hidden[rows] weight[entries]^T + bias[entries], written to `out`."""
        hidden, weight = self.hidden[rows], self.weight[entries].t()
        if self.bias is None:
            return torch.mm(hidden, weight, out=out)
        return torch.addmm(self.bias[entries], hidden, weight, out=out)

    def selected(self, index: Tensor) -> Head:
        """The head of some rows only."""
        mask = None if self.mask is None else self.mask[index]
        return replace(self, hidden=self.hidden[index], token_ids=self.token_ids[index], mask=mask)


class HeadInputs(NamedTuple):
    """What the head's ops are given first, in the order of their schemas. Positions are flat indices into token_ids."""

    hidden: Tensor  # [.., H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [..] int64
    mask: Tensor | None  # [..] bool
    temperature: float
    softcap: float | None
    shift: bool

    def computed_positions(self) -> Tensor | None:
        """Of the rows to compute, ascending; None for all. A mask's count is read once, which on a GPU waits for the mask."""
        if self.mask is not None and not self.captured:
            valid = self.valid_tokens()
            assert valid is not None
            return valid.flatten().nonzero().squeeze(1)
        if self.shift:
            return self.every_position().view(self.token_ids.shape)[..., 1:].flatten()
        return None

    def fake_rows(self) -> Any:
        """How many rows a fake call computes; unknown where a mask says which."""
        if self.mask is not None:
            return torch.library.get_ctx().new_dynamic_size()
        return self.token_ids[..., 1:].numel() if self.shift else self.token_ids.numel()

    def every_position(self) -> Tensor:
        return torch.arange(self.token_ids.numel(), device=self.token_ids.device)

    @property
    def captured(self) -> bool:
        """Inside a CUDA graph capture nothing may depend on how many rows count: all are computed, and masked."""
        return self.token_ids.is_cuda and torch.cuda.is_current_stream_capturing()

    def valid_tokens(self) -> Tensor | None:
        return views.valid_tokens(self.token_ids, self.mask, self.shift)

    def check_ids(self, op: str) -> None:
        views.check_ids(op, self.token_ids, self.mask, len(self.weight), self.shift)

    def gathered(self, positions: Tensor | None) -> Head:
        """The rows of these positions alone. With `shift`, the row before a position is the one that predicts it."""
        rows, ids = self.hidden.reshape(-1, self.hidden.shape[-1]), self.token_ids.flatten()
        mask = self.mask.flatten() if self.mask is not None and self.captured else None
        if positions is not None:
            rows, ids = rows[positions - int(self.shift)], ids[positions]
            mask = None if mask is None else mask[positions]
        return Head(rows.contiguous(), self.weight, self.bias, ids, mask, self.temperature, self.softcap)

    def scattered(self, values: Tensor, positions: Tensor | None) -> Tensor:
        """Values [M] of the computed rows in the shape of token_ids, 0 elsewhere."""
        return scattered(values, positions, self.token_ids.shape)

    def scattered_hidden(self, rows: Tensor, positions: Tensor | None) -> Tensor:
        """Gradients [M, H] of the computed rows in the shape of hidden, 0 elsewhere."""
        at = None if positions is None else positions - int(self.shift)
        return scattered(rows, at, self.hidden.shape[:-1])


def at_positions(values: Tensor, positions: Tensor | None) -> Tensor:
    """Token-sized values at the computed rows, [M]."""
    return values.flatten() if positions is None else values.flatten()[positions]


def scattered(values: Tensor, positions: Tensor | None, shape: torch.Size) -> Tensor:
    """Values [M, ..] of the rows of these positions, ascending, in the shape of token_ids, 0 elsewhere. None: all rows."""
    whole: Sequence[int] = (*shape, *values.shape[1:])
    if positions is None or len(positions) == shape.numel():
        return values.view(whole)
    out = values.new_zeros(shape.numel(), *values.shape[1:])
    out[positions] = values
    return out.view(whole)
