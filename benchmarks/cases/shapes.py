"""Sizes of inputs, and dtypes by the names that options and result rows have for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from benchmarks.harness.results import Row

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Rows N of V logits."""

    rows: int
    vocabulary: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        """NV: one pass over the logits."""
        return self.rows * self.vocabulary * self.torch_dtype.itemsize

    def fields(self) -> Row:
        """For a result row."""
        return asdict(self)


@dataclass(frozen=True)
class SequenceShape:
    """B sequences of T tokens, in groups of G."""

    batch: int
    length: int
    group: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length
