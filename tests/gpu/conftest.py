"""Tests of what only a GPU has. They are deselected where there is none, with the reason in the header.

`python -m benchmarks.gpu --dry-run` runs those that have a meaning on a CPU there, through GPU_TEST_DEVICE=cpu.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import vcpo_kernels as vk
from vcpo_kernels.core import registry

HERE = os.path.dirname(__file__)
ON_CPU = os.environ.get("GPU_TEST_DEVICE") == "cpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
BACKENDS = ("reference", "native") if ON_CPU else ("reference", "triton", "cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every test here is a GPU test; those with the fixture `cuda` make no sense anywhere else."""
    kept, left = [], []
    for item in items:
        of_gpu = str(item.path).startswith(HERE)
        if of_gpu:
            item.add_marker("gpu")
        needs_cuda = of_gpu and ("cuda" in getattr(item, "fixturenames", ()) or not ON_CPU)
        (left if needs_cuda and not torch.cuda.is_available() else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def pytest_report_header() -> str | None:
    return None if torch.cuda.is_available() else "tests/gpu: deselected, PyTorch has no CUDA device here"


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def cuda() -> torch.device:
    """For tests of streams, graphs and memory that only a GPU has."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend with row kernels for the device, in force during the test."""
    if problems := registry.objections(request.param, "token_stats", DEVICE, torch.float32):
        pytest.skip(f"{request.param}: {'; '.join(problems)}")
    with vk.use_backend(request.param):
        yield request.param
