"""Where these tests run: on the GPU where there is one, else on CPU tensors under triton's interpreter.

Triton decides at import whether it interprets, for the whole process, so on a machine without a GPU they need
a pytest of their own: TRITON_INTERPRET=1 python -m pytest tests/backends/triton
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vcpo_kernels.core import registry


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where the kernels' tensors live. What a test makes before it moves them, it makes on the CPU."""
    problem = registry.triton_problem()
    if problem is not None:
        pytest.skip(problem)
    if not registry.triton_interpreted() and not torch.cuda.is_available():
        pytest.skip("no GPU, and not under the interpreter: TRITON_INTERPRET=1 python -m pytest tests/backends/triton")
    with torch.device("cpu"):
        yield torch.device("cpu" if registry.triton_interpreted() else "cuda")
