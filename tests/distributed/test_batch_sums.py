"""vcpo_loss over data and sequence ranks is the one of the whole batch: coefficients, gradients, ESS, baselines, metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vcpo_kernels as vk
from tests import ranks
from tests.distributed import batches
from tests.distributed.batches import LAYOUTS, Layout, on_one_device

PER_SEQUENCE = ("log_weights", "advantages", "coefficients")
OF_STEP = ("ess", "ess_ratio", "ess_moments", "baselines")


def check(layout: Layout, of_ranks: list[dict[str, Any]]) -> None:
    want, grad = on_one_device(layout)
    close = {"atol": 1e-6, "rtol": 1e-6, "equal_nan": True}
    first = of_ranks[0]
    total = sum(result["loss"].double() for result in of_ranks)
    factor = len(of_ranks) if layout.averaged else 1
    torch.testing.assert_close(total.float(), factor * want.loss.detach(), **close)
    for result in of_ranks:
        for name in PER_SEQUENCE:
            torch.testing.assert_close(result["out"][name], getattr(want, name)[result["rows"]], **close)
        torch.testing.assert_close(result["grad"], factor * grad[result["rows"], result["tokens"]], **close)
        for name in OF_STEP:
            assert torch.equal(result["out"][name].nan_to_num(7.0), first["out"][name].nan_to_num(7.0)), name
        torch.testing.assert_close(result["out"]["ess_moments"], want.ess_moments, **close)
        torch.testing.assert_close(result["out"]["baselines"], want.baselines, **close)
        for name, value in want.metrics.items():
            assert torch.equal(result["metrics"][name], first["metrics"][name]), name
            torch.testing.assert_close(result["metrics"][name], value, **close)


def check_parts(layout: Layout, of_ranks: list[dict[str, Any]]) -> None:
    """ESS, the baseline and advantages by themselves, which are given log-weights and norms of whole sequences."""
    x = batches.whole()
    stats, segments = vk.token_stats(x["logits"], x["ids"], x["mask"]), vk.Segments.padded(x["mask"])
    log_weights = vk.sequence_log_weights(stats, x["mu"], segments)
    ess = vk.effective_sample_size(log_weights, segments.lengths > 0)
    norms = segments.sum(stats.score_sqnorm)
    want = vk.off_policy_baseline(x["rewards"], log_weights, norms, batches.groups_of(layout))
    close = {"atol": 1e-6, "rtol": 1e-6, "equal_nan": True}
    for result in of_ranks:
        got = result["effective_sample_size"]
        torch.testing.assert_close(got.moments, ess.moments, **close)
        assert torch.equal(got.ratio, of_ranks[0]["effective_sample_size"].ratio)
        torch.testing.assert_close(result["off_policy_baseline"], want, **close)
    groups = batches.groups_of(layout)
    of_one = batches.advantages_of(x["rewards"], groups, segments.lengths, log_weights, norms, None)
    for name, value in of_one.items():
        assert value.any(), name
        for result in of_ranks:
            torch.testing.assert_close(result["advantages"][name], value[result["rows"]], **close)
            gathers = 0 if layout.data == 1 else 2 if layout.rows is not None else 1
            assert result["called by advantages"] == ["all_gather"] * gathers * len(of_one)


def check_collectives(layout: Layout, called: list[str]) -> None:
    """One all-reduce over sequence ranks, one gather over data ranks, and one of the numbers of rows where they differ."""
    gathers = 0 if layout.data == 1 else 2 if layout.rows is not None else 1
    assert called == ["all_reduce"] * (layout.sequence > 1) + ["all_gather"] * gathers


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(batches.on_rank, 2, "2")


@pytest.mark.parametrize("name", LAYOUTS["2"])
def test_two_ranks(of_two: list[dict[str, Any]], name: str) -> None:
    layout, results = LAYOUTS["2"][name], [result[name] for result in of_two]
    check(layout, results)
    check_parts(layout, results)
    for result in results:
        check_collectives(layout, result["called"])


def test_segments_of_split_sequences_are_whole(of_two: list[dict[str, Any]]) -> None:
    mask = batches.whole()["mask"]
    for result in of_two:
        assert torch.equal(result["cp2"]["lengths"], mask.sum(1).float())
        rewards = batches.whole()["rewards"] * (mask.sum(1) > 0)
        torch.testing.assert_close(result["cp2"]["mean"], rewards)


@pytest.fixture(scope="module")
def of_four() -> list[dict[str, Any]]:
    return ranks.run(batches.on_rank, 4, "4")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS["4"])
def test_four_ranks(of_four: list[dict[str, Any]], name: str) -> None:
    layout, results = LAYOUTS["4"][name], [result[name] for result in of_four]
    check(layout, results)
    check_parts(layout, results)
    for result in results:
        check_collectives(layout, result["called"])


def test_a_shifted_pass_over_split_sequences_is_refused(of_two: list[dict[str, Any]]) -> None:
    """A part's first token was predicted on another rank: everything that would count it says so."""
    for result in of_two:
        for what, message in result["shifted"].items():
            assert message.startswith("ValueError"), what
            assert "Shift the labels before they are split" in message, what


def test_ids_of_a_rank_are_refused_on_every_rank(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        assert "groups must lie in [0, 8) over all ranks, got ids from -1 to 3" in result["wrong ids"]


def test_segments_that_do_not_know_their_ranks(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        assert "Segments.padded(mask, sequence_group=ranks.sequence)" in result["unaware"]


def a_rank_that_leaves(rank: int) -> str:
    """Rank 1 raises before the loss; what rank 0 is told."""
    if rank == 1:
        return ""
    x = batches.whole()
    stats = vk.token_stats(x["logits"], x["ids"], x["mask"])
    ranks_of_world = vk.Ranks(data=torch.distributed.group.WORLD)
    try:
        vk.vcpo_loss(stats, x["mu"], x["rewards"], 2, vk.Segments.padded(x["mask"]), ranks=ranks_of_world)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_a_rank_that_leaves_is_an_error_that_names_the_call() -> None:
    first, _ = ranks.run(a_rank_that_leaves, 2, barrier=False)
    assert first.startswith("vcpo_kernels: the all-gather of (8, 8) float64 failed: ")
    assert "Another rank has died or raised" in first


def calls_that_differ(rank: int) -> dict[str, str]:
    """Another number of sequences, of tokens, and another call on each rank; what each is told."""
    world = torch.distributed.group.WORLD
    x = {name: value[: 4 + 2 * rank].contiguous() for name, value in batches.whole().items()}
    stats = vk.token_stats(x["logits"], x["ids"], x["mask"])
    whole, split = vk.Segments.padded(x["mask"]), vk.Segments.padded(x["mask"], sequence_group=world)
    shard = vk.VocabularyShard.even(world, batches.V)

    def loss(segments: vk.Segments, **data: vk.Ranks) -> object:
        return vk.vcpo_loss(stats, x["mu"], x["rewards"], 2, segments, **data)

    calls = {
        "sequences over data ranks": lambda: loss(whole, ranks=vk.Ranks(data=world)),
        "sequences over sequence ranks": lambda: loss(split),
        "tokens over vocabulary ranks": lambda: vk.token_stats(x["logits"], x["ids"], x["mask"], vocabulary=shard),
        "another call": lambda: loss(split) if rank else loss(whole, ranks=vk.Ranks(data=world)),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing was raised"
        except RuntimeError as error:
            found[name] = str(error)
    return found


def test_calls_that_differ_are_errors_on_every_rank_that_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TORCH_DISTRIBUTED_DEBUG=DETAIL, as the message of a failed call advises."""
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    for rank, found in enumerate(ranks.run(calls_that_differ, 2, barrier=False)):
        for name, message in found.items():
            assert message.startswith("vcpo_kernels: the all-"), (rank, name, message)
            assert "mismatch between collectives" in message, (rank, name, message)
