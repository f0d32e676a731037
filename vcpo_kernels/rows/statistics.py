"""RowStatistics: what a pass over rows of logits leaves of each, as one thing from the kernels to the public functions.

Layer: rows [N, V] -> tokens [N]. Backends return it, ops list its fields in their schemas, `TokenStats` is made of
it. A further statistic is a field here, and then what CONTRIBUTING.md lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vcpo_kernels.core.dtypes import wide


class RowStatistics(NamedTuple):
    """Of each row, in fp32 (float64 for float64 rows): log pi(y), entropy, squared score norm, log-sum-exp.

    `TokenStats` has the definitions.
    """

    logp: Tensor
    entropy: Tensor
    score_sqnorm: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, shape: Sequence[int], rows: Tensor) -> RowStatistics:
        """To be written, for rows (or hidden states) of this dtype and device."""
        return cls(*(torch.empty(shape, dtype=wide(rows.dtype), device=rows.device) for _ in cls._fields))

    def map(self, function: Callable[[Tensor], Tensor]) -> RowStatistics:
        """The function applied to each."""
        return RowStatistics(*map(function, self))


# As the ops' schemas return them, and what they take besides tensors.
RETURNS = ", ".join(f"Tensor {name}" for name in RowStatistics._fields)
SETTINGS = "float temperature, float? softcap, bool shift"
