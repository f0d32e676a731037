"""Rows whose vocabulary ranks share: one device's statistics and gradients, the same bits on all, counted collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests import ranks
from tests.distributed import vocabularies
from tests.distributed.vocabularies import BACKENDS, HEADS, HEADS_OF_FOUR, ROWS, ROWS_OF_FOUR, Case, HeadCase

STATISTICS, GRADIENTS = 2e-6, 5e-6
ONE_GATHER = ["all_gather_into_tensor"]
# What one rounding of a gradient may be.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def close_statistics(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = STATISTICS) -> None:
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, atol=bound, rtol=bound, equal_nan=True, msg=lambda m, n=name: n + m
        )


def close_gradient(got: Tensor, want: Tensor, dtype: torch.dtype, largest: float) -> None:
    """Relative to the largest entry of the whole; and to itself what rounding costs."""
    got, want = got.float(), want.float()
    assert torch.equal(got.isnan(), want.isnan())
    bound = {"atol": GRADIENTS * largest, "rtol": ROUNDING[dtype]}
    torch.testing.assert_close(got, want, **bound, equal_nan=True)


def part(whole: Tensor, entries: slice, size: int, dim: int) -> Tensor:
    """Of this rank, 0 where its entries are padding."""
    whole = whole.movedim(dim, 0)
    padded = torch.cat([whole, whole.new_zeros(max(0, entries.stop - size), *whole.shape[1:])])
    return padded[entries].movedim(0, dim)


def check_rows(case: Case, of_ranks: list[dict[str, Any]]) -> None:
    want = vocabularies.rows_of_case(case, None, None)
    for result in of_ranks:
        assert result["forward"] == ONE_GATHER
        assert result["backward"] == []
        for name, value in of_ranks[0]["stats"].items():
            assert torch.equal(result["stats"][name].nan_to_num(7.0), value.nan_to_num(7.0)), name
        assert torch.equal(result["loss"].nan_to_num(7.0), of_ranks[0]["loss"].nan_to_num(7.0))
        close_statistics(result["stats"], want["stats"])
        close_statistics(result["again"], want["stats"])
        for name in ("grad", "weighted"):
            largest = want[name].float().nan_to_num(0.0).abs().amax().item()
            close_gradient(result[name], part(want[name], result["entries"], case.size, -1), case.dtype, largest)
        torch.testing.assert_close(result["loss"], want["loss"], atol=1e-5, rtol=2e-6, equal_nan=True)
        torch.testing.assert_close(result["of_c"], want["of_c"], atol=5e-6, rtol=5e-6, equal_nan=True)


def check_head(head: HeadCase, of_ranks: list[dict[str, Any]]) -> None:
    case = head.case
    want = vocabularies.head_of_case(head, None, None)
    exact = case.dtype == torch.float32
    for result in of_ranks:
        assert result["forward"] == ONE_GATHER
        assert result["backward"] == ["all_reduce"]
        assert result["sum"] == [*ONE_GATHER, "all_reduce"]
        for name, value in of_ranks[0]["stats"].items():
            assert torch.equal(result["stats"][name], value), name
        assert torch.equal(result["grads"][0], of_ranks[0]["grads"][0])
        close_statistics(result["stats"], want["stats"], STATISTICS if exact else 2e-2)
        for name in ("grads", "weighted"):
            for i, (got, wanted) in enumerate(zip(result[name], want[name], strict=True)):
                whole = i == 0 or wanted.shape[0] != case.size
                expected = wanted if whole else part(wanted, result["entries"], case.size, 0)
                largest = wanted.abs().amax().item() * (GRADIENTS if exact else 2e-2)
                torch.testing.assert_close(got, expected, atol=largest, rtol=0.0)


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(vocabularies.on_rank, 2, ROWS, HEADS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ROWS)
def test_rows_on_two_ranks(of_two: list[dict[str, Any]], name: str, backend: str) -> None:
    with vk.use_backend("reference"):
        check_rows(ROWS[name], [result[f"{backend}, {name}"] for result in of_two])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HEADS)
def test_heads_on_two_ranks(of_two: list[dict[str, Any]], name: str, backend: str) -> None:
    with vk.use_backend("reference"):
        check_head(HEADS[name], [result[f"{backend}, head, {name}"] for result in of_two])


@pytest.fixture(scope="module")
def of_four() -> list[dict[str, Any]]:
    return ranks.run(vocabularies.on_rank, 4, ROWS_OF_FOUR, HEADS_OF_FOUR)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ROWS_OF_FOUR)
def test_rows_on_four_ranks(of_four: list[dict[str, Any]], name: str, backend: str) -> None:
    with vk.use_backend("reference"):
        check_rows(ROWS_OF_FOUR[name], [result[f"{backend}, {name}"] for result in of_four])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HEADS_OF_FOUR)
def test_heads_on_four_ranks(of_four: list[dict[str, Any]], name: str, backend: str) -> None:
    with vk.use_backend("reference"):
        check_head(HEADS_OF_FOUR[name], [result[f"{backend}, head, {name}"] for result in of_four])
