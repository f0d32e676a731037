"""Rows whose vocabulary ranks share: one device's statistics and gradients, the same bits on all, counted collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests import ranks
from tests.distributed import vocabularies, vocabulary_calls
from tests.distributed.vocabularies import BACKENDS, HEADS, HEADS_OF_FOUR, ROWS, ROWS_OF_FOUR, Case, HeadCase

STATISTICS, GRADIENTS = 2e-6, 5e-6
ONE_GATHER = ["all_gather"]
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
        of_hidden = ["all_reduce"] if head.sums else []
        assert result["backward"] == of_hidden
        assert result["sum"] == [*ONE_GATHER, *of_hidden]
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


def on_two_ranks(rank: int) -> dict[str, Any]:
    return vocabularies.on_rank(rank, ROWS, HEADS) | vocabulary_calls.on_rank(rank)


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(on_two_ranks, 2)


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


def close(got: Tensor, want: Tensor, bound: float = GRADIENTS) -> None:
    torch.testing.assert_close(got, want, atol=bound * want.abs().max().item(), rtol=0.0)


def test_dtensor_logits_are_shards(of_two: list[dict[str, Any]]) -> None:
    x = vocabulary_calls.inputs()
    logits = x["logits"].requires_grad_()
    stats = vk.token_stats(logits, x["ids"])
    (grad,) = torch.autograd.grad(vocabulary_calls.loss_of(stats, x["g"]), logits)
    summed, _ = vk.weighted_logp(logits, x["ids"], x["g"])
    (weighted,) = torch.autograd.grad(summed, logits)
    for result in of_two:
        for name, wanted in (("logits", (stats.logp, grad)), ("known coefficients", (summed, weighted))):
            for got, want in zip(result["dtensors"][name], wanted, strict=True):
                close(got, want.detach())


def test_a_dtensor_head_beside_a_dtensor_hidden(of_two: list[dict[str, Any]]) -> None:
    """Replicated, sharded by tokens (sequence parallel: gathered, its gradient scattered), or plain and told."""
    x = vocabulary_calls.inputs()
    operands = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    stats = vk.linear_token_stats(*operands[:2], x["ids"], operands[2], shift=True)
    grads = torch.autograd.grad(vocabulary_calls.loss_of(stats, x["g"]), operands)
    for result in of_two:
        for name in ("hidden replicated", "hidden sharded by tokens", "hidden plain"):
            for got, want in zip(result["dtensors"][name], (stats.logp.detach(), *grads), strict=False):
                close(got, want)
        *_, counts, placements = result["dtensors"]["hidden replicated"]
        assert sum(counts.values()) == 2, counts  # the states, and d hidden
        assert placements[0].is_replicate()
        *_, counts, placements = result["dtensors"]["hidden sharded by tokens"]
        assert sum(counts.values()) == 3, counts  # and hidden
        assert placements[0].is_shard(1)


def test_what_a_dtensor_means_is_asked_where_it_is_not_clear(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        plain, known, by_batch, leaf, ids = result["dtensors"]["refused"]
        for text, name in ((plain, "linear_token_stats"), (known, "linear_weighted_logp")):
            assert text.startswith(
                f"TypeError: {name}: weight is a DTensor, of which this rank holds a part, and hidden"
            )
            assert "vocabulary=VocabularyShard.of_dtensor(weight, 0)" in text
        assert "logits is a DTensor, of which this rank holds a part. Pass logits.full_tensor()" in by_batch
        assert "would overwrite a leaf tensor's values" in leaf
        assert "token_ids is a DTensor" in ids


def test_compiled_without_a_break(of_two: list[dict[str, Any]]) -> None:
    """One gather in the graph, and temperatures of each call."""
    for result in of_two:
        assert len(set(result["compiled"]["collectives"])) == 1
        assert "all_gather" in result["compiled"]["collectives"][0]
        assert max(result["compiled"]["differences"]) == 0.0


def test_refused_on_every_rank(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        refused = result["refused"]
        assert refused["sum without a shard"].startswith(
            "ValueError: linear_token_stats: sum_hidden=False leaves d hidden as"
        )
        assert refused["sum of a number"].startswith(
            "TypeError: linear_weighted_logp: sum_hidden must be a bool, got 1"
        )
        assert refused["id"].startswith(
            "ValueError: token_stats: token_ids must lie in [0, 41) where the mask is true, got 41"
        )
        assert refused["head id"].startswith("ValueError: linear_token_stats: token_ids must lie in [0, 41)")
        assert refused["group"].startswith("TypeError: token_stats: vocabulary must be a VocabularyShard or None")


def test_no_token_counts(of_two: list[dict[str, Any]]) -> None:
    assert all(result["nothing"] == [0.0] * 6 for result in of_two)


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
