"""Parameters whose gradients somebody else forms, and how the fused head finds out.

Layer: rows. `SequenceGradients` registers itself here, so that `linear_token_stats` can hand it the head's part without
knowing of models or sequences.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check


class Deferral(Protocol):
    """Somebody who forms the gradients of some parameters later."""

    def defers(self, parameter: Tensor) -> bool:
        """Whether this parameter's gradient is theirs."""

    def linear_token_stats(self, parameters: tuple[Tensor, Tensor | None], *arguments: Any) -> tuple[Tensor, ...]:
        """The op's first four outputs, differentiable to hidden alone; the weight's and bias's part is recorded.

        arguments: the operands, the shard of the vocabulary or None, whether d hidden is to be summed over its ranks, and
        memory, chunk_bytes, fast_bytes.
        """


active: list[Deferral] = []


def deferral_of(*parameters: Tensor | None) -> Deferral | None:
    """Who defers any of these parameters, while autograd records."""
    if torch.is_grad_enabled():
        for deferral in reversed(active):
            if any(p is not None and deferral.defers(p) for p in parameters):
                return deferral
    return None


def refuse(check: Check, instead: str, *parameters: Tensor | None) -> None:
    """Raise where a gradient that this function would form itself is deferred."""
    if active and deferral_of(*parameters) is not None:
        raise check.runtime_error(
            f"its gradients are formed in the forward, those of each sequence added up, but SequenceGradients "
            f"needs them apart. Inside `with SequenceGradients(model)` use {instead}."
        )
