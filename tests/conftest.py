"""Shared fixtures. Every fresh tensor is poisoned, so that an output a kernel forgot to write fails its test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

import vcpo_kernels as vk
from vcpo_kernels.core import registry

# VCPO_TEST_DEVICE=cuda: tensors that a test makes without saying where are made on the GPU, and every backend that runs
# there takes the place of those that run on a CPU. Set before test modules are imported, for the constants they hold.
DEVICE = torch.device(os.environ.get("VCPO_TEST_DEVICE", "cpu"))
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under VCPO_TEST_DEVICE, deselect what is marked cpu_only."""
    if DEVICE.type == "cpu":
        return
    left = [item for item in items if item.get_closest_marker("cpu_only")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like return NaN (a large odd number for integers) instead of what memory held."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
            out = make(*args, **kwargs)
            if torch.compiler.is_compiling() or type(out) is not torch.Tensor or out.device.type == "meta":
                return out
            if out.is_floating_point():
                out.detach().fill_(float("nan"))
                return out
            return out if out.dtype == torch.bool else out.fill_(101)

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def native() -> Iterator[object]:
    """The compiled extension; its instruction set is put back after the test."""
    if DEVICE.type != "cpu":
        pytest.skip("of the CPU's kernels: run it without VCPO_TEST_DEVICE")
    problem = registry.native_problem()
    assert problem is None, f"the test suite needs the compiled extension: {problem}"
    from vcpo_kernels import _native

    before = _native.isa_chosen()
    yield _native
    _native.isa_choose(before)


IMPLEMENTATIONS = {
    "cpu": ("reference", "native:baseline", "native:avx2", "native:avx512"),
    "cuda": ("reference", "triton", "cuda"),
}[DEVICE.type]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs on the device under test, the native one in each instruction set that this machine has."""
    name, _, isa = request.param.partition(":")
    if isa:
        native = request.getfixturevalue("native")
        if isa not in native.isa_available():
            pytest.skip(f"this CPU has no {isa}")
        native.isa_choose(isa)
    if problems := registry.objections(name, "token_stats", DEVICE, torch.float32):
        pytest.skip(f"{name}: {'; '.join(problems)}")
    with vk.use_backend(name):
        yield name
