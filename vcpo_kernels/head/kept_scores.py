"""What the head's forward keeps for its backward, and the gradients from it.

Layer: rows. Kept is S = d logp / d logits [M, V] ("fast"), S W [M, H] (nothing but hidden needs a gradient), or no row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import no_autocast
from vcpo_kernels.head.accumulate import HeadGradients, gradients
from vcpo_kernels.head.chunks import empty_large
from vcpo_kernels.head.free_memory import free_bytes
from vcpo_kernels.head.operands import Head, HeadInputs, Needs
from vcpo_kernels.head.score_matrix import active_rows


def score_matrix(head: Head, memory: str) -> Tensor | None:
    """Memory for S. None under "auto" where there is none after all: what is free is an estimate, and others take of it."""
    try:
        return empty_large((head.rows, head.vocabulary), head.hidden)
    except RuntimeError as error:  # a GPU's allocator raises OutOfMemoryError, a CPU's its parent
        if memory == "auto":
            return None
        size = head.rows * head.vocabulary * head.hidden.element_size()
        raise torch.OutOfMemoryError(
            f'linear_token_stats: memory="fast" keeps a score matrix [{head.rows}, {head.vocabulary}] of {size / 2**30:.2f} '
            f'GiB, which could not be allocated. Pass memory="lean", or fewer rows at a time. {error}'
        ) from error


def takes_fast(head: Head, memory: str, chunk_bytes: int, fast_bytes: int | None) -> bool:
    """Whether S is to be kept: under "auto", where it fits."""
    if memory != "auto":
        return memory == "fast"
    size = head.rows * head.vocabulary * head.hidden.element_size()
    if fast_bytes is not None:
        return size <= fast_bytes
    # Where all rows are one chunk, "lean" allocates as much. Asking for what is free reads a dozen files.
    return size <= chunk_bytes or size <= free_bytes(head.hidden.device) // 2


def fake_kept_rows(rows: Any, memory: str) -> Any:
    """Of a fake call: as many as are computed ("fast"), none ("lean"), or a number that is not known."""
    kept = {"fast": rows, "lean": 0}.get(memory)
    return torch.library.get_ctx().new_dynamic_size() if kept is None else kept


def gradients_of(
    inputs: HeadInputs, saved: tuple[Tensor, Tensor, Tensor, Tensor], positions: Tensor, kept: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, chunk_bytes: int, needs: Needs,
) -> HeadGradients:  # fmt: skip
    """saved: logp, entropy, lse, target_logit in the shape of token_ids. positions: of the rows that the forward computed."""
    active = active_rows(inputs, saved, positions, grad_logp, grad_entropy)
    with no_autocast(inputs.hidden):
        if needs.parameters or active.saved.h is not None or not len(kept):
            d = gradients(active.head, active.logits_gradient(kept, chunk_bytes), needs)
        else:  # the product of scores and weight is what was kept
            product = kept if active.index is None else kept[active.index]
            nothing = inputs.hidden.new_empty(0)
            d = HeadGradients((product * active.saved.g[:, None]).to(inputs.hidden.dtype), nothing, nothing)
    return d._replace(hidden=inputs.scattered_hidden(d.hidden, active.positions)) if needs.hidden else d
