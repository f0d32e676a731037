"""Where the CUDA kernels serve on a GPU: what they were measured to win, by architecture. Triton serves all the rest.

`python -m benchmarks.gpu.choose RESULTS` prints entries from a result file of `make gpu`. None stands here before such a
file is committed under benchmarks/results/.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Win:
    """CUDA beat Triton by more than the spread on rows of these widths. dtype: "bfloat16", "float16" or "float32"."""

    op: str
    dtype: str
    min_vocabulary: int
    max_vocabulary: int


# By compute capability. Empty: no GPU has run both yet.
MEASURED: dict[tuple[int, int], tuple[Win, ...]] = {}


def cuda_wins(op: str, dtype: torch.dtype, vocabulary: int, capability: tuple[int, int]) -> bool:
    """Whether the table has a win for rows of `vocabulary` entries; never for 0, which says that the width is not known."""
    name = str(dtype).removeprefix("torch.")
    return any(
        win.op == op and win.dtype == name and win.min_vocabulary <= vocabulary <= win.max_vocabulary
        for win in MEASURED.get(capability, ())
    )
