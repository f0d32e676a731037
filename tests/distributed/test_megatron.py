"""Vocabulary shards against Megatron-core's own: its loss, its output layer, its GPTModel, sequence parallel or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="needs megatron-core: make test-ranks")
from tests import ranks
from tests.distributed import megatron_heads as heads
from tests.distributed import sharded_models as models
from tests.distributed.megatron_heads import HEADS, LOSSES, SUMS

BOUND = 3e-6
WORLDS = (2, 4)


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    return {world: ranks.run(heads.on_ranks, world, world) for world in WORLDS}


def close(got: Tensor, want: Tensor, rounding: float = 0.0) -> None:
    scale = float(want.float().abs().max())
    torch.testing.assert_close(got.float(), want.float(), atol=BOUND * max(scale, 1e-3), rtol=rounding)


@pytest.mark.parametrize("case", LOSSES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_the_loss(found: dict[int, list[dict[str, Any]]], world: int, case: tuple[int, torch.dtype, bool]) -> None:
    """logp and d logits of vocab_parallel_cross_entropy, ids on every shard's edges, padding counted or told."""
    for result in found[world]:
        of = result[f"loss {case}"]
        close(*of["logp"])
        rounding = 2.0**-7 if case[1] is torch.bfloat16 else 0.0  # each rounds once
        close(*of["grad"], rounding)
        close(*of["known"], rounding)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_the_output_layer(
    found: dict[int, list[dict[str, Any]]], world: int, sequence_parallel: bool, sums: str, head: str
) -> None:
    """logp, d hidden of this rank's tokens and d weight of its shard are ColumnParallelLinear's: d hidden is summed once."""
    for result in found[world]:
        of = result[f"layer {sequence_parallel}"]
        for got, want in zip(of[f"{sums}; {head}"], of["Megatron"], strict=True):
            close(got, want)
        assert of[f"{sums}; {head}; called"] == ["all_gather", *(["all_reduce"] if sums == "head" else [])]


@pytest.mark.parametrize("world", WORLDS)
def test_who_sums_is_checked(found: dict[int, list[dict[str, Any]]], world: int) -> None:
    for result in found[world]:
        refused = result["refused"]
        for name in ("False Megatron", "True Megatron"):
            assert refused[name].startswith(
                "linear_token_stats: hidden comes from Megatron's gather_from_sequence_parallel_reg"
            )
            assert refused[name].endswith("and so would this. Pass sum_hidden=False.")
        assert refused["OPOB"].startswith("OPOBAccumulator: params holds slices of Megatron's tensor parallelism")
        assert refused["True head"].startswith(
            "linear_token_stats: sum_hidden=False, but hidden comes from Megatron's gather_fr"
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_the_model(found: dict[int, list[dict[str, Any]]], world: int, sequence_parallel: bool, tied: bool) -> None:
    """GPTModel's loss and the gradients of all of its parameters, by ours of its logits and of its hidden states."""
    for result in found[world]:
        of = result[f"model {sequence_parallel} {tied}"]
        logp, gradients = of["Megatron"]
        assert len(gradients) > 20
        assert list(of) == ["Megatron", "logits", "hidden; head", *(["hidden; Megatron"] if sequence_parallel else [])]
        for got in of.values():
            close(got[0], logp)
            models.assert_close(got[1], gradients, BOUND)
