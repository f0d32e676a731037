"""Shared fixtures. Every fresh tensor is poisoned, so that an output a kernel forgot to write fails its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import vcpo_kernels as vk
from vcpo_kernels.backends import registry


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like return NaN (a large odd number for integers) instead of what memory held."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
            out = make(*args, **kwargs)
            if torch.compiler.is_compiling() or type(out) is not torch.Tensor or out.device.type == "meta":
                return out
            if out.is_floating_point():
                return out.fill_(float("nan"))
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
    problem = registry.native_problem()
    assert problem is None, f"the test suite needs the compiled extension: {problem}"
    from vcpo_kernels import _native

    before = _native.isa_chosen()
    yield _native
    _native.isa_choose(before)


IMPLEMENTATIONS = ("reference", "native:baseline", "native:avx2", "native:avx512")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs on a CPU, the native one in each instruction set that this machine has."""
    name, _, isa = request.param.partition(":")
    if isa:
        native = request.getfixturevalue("native")
        if isa not in native.isa_available():
            pytest.skip(f"this CPU has no {isa}")
        native.isa_choose(isa)
    with vk.use_backend(name):
        yield name
