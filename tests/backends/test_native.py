"""One adapter for the extension's two places: which modules serve them, and what a wrong place or statistic does."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from vcpo_kernels.core import registry


@pytest.mark.parametrize("op", sorted(registry.ROW_OPS | registry.SHARD_OPS))
def test_both_places_are_served_by_the_same_module(native: ModuleType, op: str) -> None:
    """A second adapter would have to be kept in step by hand."""
    assert registry._load("cuda", op) is registry._load("native", op)


def test_a_cpu_tensor_gets_a_place_on_any_build(native: ModuleType) -> None:
    from vcpo_kernels.backends.native.arguments import place_of

    with place_of(torch.zeros(1, 1, 4)) as place:
        assert isinstance(place, native.Place)


def test_a_gpu_place_without_its_kernels_names_the_cure(native: ModuleType) -> None:
    """Only who bypasses the registry, whose probe says the same, comes here: an error, never a CPU kernel on a GPU's memory."""
    if native.cuda:
        pytest.skip("this extension has the CUDA kernels")
    with pytest.raises(RuntimeError, match=r"Place.cuda: device 1, but .* without nvcc; .*VCPO_CUDA=ON"):
        native.Place.cuda(1, 0)


def test_statistics_that_the_extension_does_not_know_are_an_error(native: ModuleType) -> None:
    """An extension older than the Python beside it must not write one statistic into another's memory."""
    with pytest.raises(TypeError, match="max_logp"):
        native.Statistics(logp=0, entropy=0, score_sqnorm=0, lse=0, max_logp=0)
