"""The torch.library namespace that all ops of this package are defined in: `torch.ops.vcpo_kernels.*`."""

from __future__ import annotations

import torch

NAMESPACE = "vcpo_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def qualified(name: str) -> str:
    """The name torch.library knows an op of ours by."""
    return f"{NAMESPACE}::{name}"
