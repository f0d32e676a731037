"""Collectives, counted: what a call is said to send is asserted, not believed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

# Function of torch.distributed -> what it is counted as.
COUNTED = {
    "all_reduce": "all_reduce",
    "all_gather_single": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}


@contextlib.contextmanager
def collectives() -> Iterator[list[str]]:
    """The names of the collectives called inside, in their order."""
    called: list[str] = []

    def counted(name: str) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(COUNTED[name])
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for name in COUNTED:
            if hasattr(dist, name):
                patches.enter_context(mock.patch.object(dist, name, counted(name)))
        yield called
