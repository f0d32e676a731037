"""Backwards that leave the logits as they are, although the gradient was to be written over them.

Layer: rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_keeping: list[None] = []  # of every thread: autograd runs a GPU's backward in one of its own


@contextlib.contextmanager
def logits_kept() -> Iterator[None]:
    """Backwards inside leave the logits as they are, `inplace_backward` or not: the same graph is differentiated again."""
    _keeping.append(None)
    try:
        yield
    finally:
        _keeping.pop()


def logits_are_kept() -> bool:
    """Whether this backward runs inside `logits_kept`."""
    return bool(_keeping)
