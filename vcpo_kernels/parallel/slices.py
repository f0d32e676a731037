"""Megatron's tensor parallelism: plain parameters, each a rank's slice, known by an attribute alone.

Layer: process groups.
"""

from __future__ import annotations

import sys
from typing import Any


def is_slice(parameter: Any) -> bool:
    """Whether this is a part of a parameter that Megatron's tensor ranks have sliced among them."""
    if not getattr(parameter, "tensor_model_parallel", False):  # set with one rank too
        return False
    state: Any = sys.modules.get("megatron.core.parallel_state")
    return bool(state and state.model_parallel_is_initialized() and state.get_tensor_model_parallel_world_size() > 1)
