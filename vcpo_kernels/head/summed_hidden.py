"""Who adds up the vocabulary shards' parts of d hidden: the head, or the backward of what gathered hidden; never both.

Layer: rows [N, H] x [v, H] -> tokens [N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vcpo_kernels.core.checks import Check

# Megatron's functions in front of a head, by their nodes: whether the backward of this one sums over tensor ranks.
_SUMS: dict[str, Callable[[Any], bool]] = {
    "_CopyToModelParallelRegionBackward": lambda node: True,
    "_GatherFromSequenceParallelRegionBackward": lambda node: bool(node.tensor_parallel_output_grad),
}
# What may stand between: the same entries in another form.
_VIEWS = (
    "Transpose", "Permute", "T", "View", "UnsafeView", "Reshape", "ToCopy", "Clone", "Slice", "Squeeze", "Unsqueeze",
)  # fmt: skip


def check_sum(check: Check, hidden: Any, sum_hidden: object, vocabulary: Any) -> None:
    """Raise where d hidden would be left as a part with no shard given, be summed twice, or, as far as that shows, never."""
    summed = check.boolean("sum_hidden", sum_hidden)
    if vocabulary is None:
        if not summed:
            raise check.value_error(
                "sum_hidden=False leaves d hidden as a shard's part, but vocabulary is None. Say which shard: "
                "vocabulary=VocabularyShard.even(group, weight.shape[0])."
            )
        return
    behind = None if torch.compiler.is_compiling() else _summed_behind(hidden)
    if behind is True and summed:
        raise check.value_error(
            "hidden comes from Megatron's gather_from_sequence_parallel_region or copy_to_tensor_model_parallel_region, whose "
            "backward adds up the shards' parts of d hidden, and so would this. Pass sum_hidden=False."
        )
    if behind is False and not summed:
        raise check.value_error(
            "sum_hidden=False, but hidden comes from Megatron's gather_from_sequence_parallel_region with "
            "tensor_parallel_output_grad=False, whose backward takes d hidden as summed. Pass True there, or sum_hidden=True."
        )


def _summed_behind(hidden: Any) -> bool | None:
    """Whether the backward of what gave hidden sums its gradient; None: it is nothing that is known."""
    node = getattr(hidden, "grad_fn", None)
    while node is not None:
        name = type(node).__name__
        if name in _SUMS:
            return _SUMS[name](node)
        if name.partition("Backward")[0] not in _VIEWS:
            return None
        node = node.next_functions[0][0]
    return None
