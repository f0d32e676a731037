"""Every objective over data and sequence ranks is that of the whole batch, with every extra term at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vcpo_kernels as vk
from tests import ranks
from tests.distributed import batches
from tests.distributed.batches import LAYOUTS, METHODS, OF_OBJECTIVES
from vcpo_kernels import objectives

# Beside the one that all make, over sequence ranks: sums of ratios, lengths, and whether a token drops its whole sequence.
MORE = {
    "gspo": 3, "gspo_token": 3, "gmpo": 3, "opsm": 3, "vespo": 2, "topr": 2,
    "sequence_masked_is": 2, "sequence_truncated_is": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Any]]:
    return batches.objectives_on_one_device()


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, dict[str, Any]]]:
    return ranks.run(batches.objectives_on_rank, 2, "2")


@pytest.fixture(scope="module")
def of_four() -> list[dict[str, dict[str, Any]]]:
    return ranks.run(batches.objectives_on_rank, 4, "4")


def check(names: str, layout: str, name: str, want: dict[str, Any], of_ranks: list[dict[str, Any]]) -> None:
    """Gradients, coefficients and metrics are the whole batch's; what is of the step has the same bits on every rank."""
    close = {"atol": 1e-6, "rtol": 1e-6, "equal_nan": True}
    out, grad = want["out"], want["grad"]
    factor = len(of_ranks) if LAYOUTS[names][layout].averaged else 1
    torch.testing.assert_close(sum(r["loss"].double() for r in of_ranks).float(), factor * out.loss.detach(), **close)
    for result in of_ranks:
        rows, tokens = result["rows"], result["tokens"]
        torch.testing.assert_close(result["grad"], factor * grad[rows, tokens], **close)
        torch.testing.assert_close(result["coefficients"], out.coefficients[rows, tokens], **close)
        torch.testing.assert_close(result["log_weights"], out.log_weights[rows], **close)
        torch.testing.assert_close(result["ess_moments"], out.ess_moments, **close)
        assert result["metrics"].keys() == out.metrics.keys()
        for key, value in out.metrics.items():
            torch.testing.assert_close(result["metrics"][key], value, **close)
            assert torch.equal(result["metrics"][key].nan_to_num(7.0), of_ranks[0]["metrics"][key].nan_to_num(7.0)), key


@pytest.mark.parametrize("layout", OF_OBJECTIVES["2"])
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks(
    name: str, layout: str, whole: dict[str, dict[str, Any]], of_two: list[dict[str, dict[str, Any]]]
) -> None:
    results = [result[f"{layout}: {name}"] for result in of_two]
    check("2", layout, name, whole[name], results)
    of = LAYOUTS["2"][layout]
    for result in results:
        reductions = result["called"].count("all_reduce")
        assert reductions == (0 if of.sequence == 1 else 1 + MORE.get(name, 0)), result["called"]
        assert len(result["called"]) - reductions == (0 if of.data == 1 else 2 if of.rows is not None else 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", OF_OBJECTIVES["4"])
@pytest.mark.parametrize("name", METHODS)
def test_four_ranks(
    name: str, layout: str, whole: dict[str, dict[str, Any]], of_four: list[dict[str, dict[str, Any]]]
) -> None:
    check("4", layout, name, whole[name], [result[f"{layout}: {name}"] for result in of_four])


def test_a_method_of_the_whole_batch_is_refused() -> None:
    """M2PO sorts all tokens; ranks say that there are others."""
    x = batches.whole()
    stats = vk.token_stats(x["logits"].requires_grad_(), x["ids"], x["mask"])
    with pytest.raises(ValueError, match=r"^m2po: ranks= .*it sorts the tokens of the whole batch"):
        objectives.m2po(stats, x["mu"], x["rewards"], vk.Segments.padded(x["mask"]), ranks=vk.Ranks())


def test_what_is_no_ranks_is_named() -> None:
    x = batches.whole()
    stats, segments = vk.token_stats(x["logits"], x["ids"], x["mask"]), vk.Segments.padded(x["mask"])
    for call in (
        lambda: objectives.reinforce(stats, x["mu"], x["rewards"], segments, ranks="dp"),
        lambda: vk.vcpo_loss(stats, x["mu"], x["rewards"], 2, segments, ranks="dp"),
    ):
        with pytest.raises(TypeError, match=r"ranks must be a Ranks, got 'dp'.*Ranks\.of\(mesh\)"):
            call()
    with pytest.raises(TypeError, match=r"sequence_group must be a torch.distributed process group or None, got 3"):
        vk.Segments.padded(x["mask"], sequence_group=3)
