"""Collectives, counted: what a call is said to send is asserted, not believed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

COUNTED = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "broadcast",
)


@contextlib.contextmanager
def collectives() -> Iterator[list[str]]:
    """The names of the collectives called inside, in their order."""
    called: list[str] = []

    def counted(name: str) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for name in COUNTED:
            patches.enter_context(mock.patch.object(dist, name, counted(name)))
        yield called
