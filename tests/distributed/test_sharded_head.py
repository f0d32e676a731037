"""patch_head under FSDP2, wherever the head was put: one process's statistics and gradients, and nothing left behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import vcpo_kernels as vk
from tests import ranks
from tests.distributed import sharded_models as models
from tests.distributed.sharded_models import B
from vcpo_kernels.head.linear_token_stats import linear_token_stats

BOUND = 2e-6
PLACEMENTS = ("root", "each", "head", "head, kept", "norm and head", "norm and head, kept")
HEADS = ("fast", "lean", "weighted_logp")
STEPS = 6


def loss_of(model: Any, rows: slice, head: str) -> tuple[Tensor, vk.TokenStats]:
    """sum_t c logp + 0.1 entropy of these rows; weighted_logp: without the entropy."""
    x = models.batch("llama")
    ids, mask, c = x["ids"][rows], x["mask"][rows], x["c"][rows, None].expand(-1, models.T).contiguous()
    with vk.patch_head(model):
        out = model(ids)
    if head == "weighted_logp":
        return out.weighted_logp(ids, c, mask)  # type: ignore[no-any-return]
    stats = out.token_stats(ids, mask, memory=head)
    return (c * stats.logp + 0.1 * stats.entropy).sum(), stats


def run(placement: str, head: str, tied: bool, frozen: bool = False) -> dict[str, Any]:
    ranks_ = dist.get_world_size()
    share = B // ranks_
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    model = models.sharded("llama, tied" if tied else "llama", placement)
    if frozen:
        model.model.requires_grad_(False)
    (ranks_ * loss_of(model, rows, head)[0]).backward()
    first = models.gradients_of(model)
    model.zero_grad()
    halves = [slice(i, i + share // 2) for i in (rows.start, rows.start + share // 2)]
    losses = [ranks_ * loss_of(model, half, head)[0] for half in halves]  # the second forward before the first backward
    for loss in losses:
        loss.backward()
    return {"gradients": first, "of two": models.gradients_of(model)}


def statistics(placement: str) -> dict[str, Any]:
    """Without gradients, then after an optimizer step: nothing that was gathered may be stale."""
    model = models.sharded("llama", placement)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        before = loss_of(model, slice(None), "fast")[1].logp
    loss_of(model, slice(None), "fast")  # a forward that no backward follows
    model.reshard()  # as FSDP2 has it, the root stays gathered, and units that are kept; the head's unit must not
    if placement.endswith("kept"):
        model.lm_head.reshard()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        return {"before": before, "after": loss_of(model, slice(None), "fast")[1].logp}


def hooks(placement: str, head: str) -> list[int]:
    """On the head's weight, gathered, after each step."""
    model = models.sharded("llama", placement)
    unit = model.lm_head if hasattr(model.lm_head, "unshard") else model
    counts = []
    for _ in range(STEPS):
        loss_of(model, slice(0, 4), head)[0].backward()
        unit.unshard()
        counts.append(len(model.lm_head.weight._backward_hooks or {}))
        unit.reshard()
    return counts


def in_another_dtype(placement: str) -> dict[str, Any]:
    """MixedPrecisionPolicy(output_dtype=float32): the dtype that the head works in."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    seen = []

    def spy(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> vk.TokenStats:
        seen.append((hidden.dtype, weight.dtype))
        return linear_token_stats(hidden, weight, *rest, **options)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = models.sharded("llama", placement, mp_policy=policy)
    model._get_fsdp_state()._mp_policy = dataclasses.replace(policy, output_dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vcpo_kernels.head.patch_head.linear_token_stats", spy)
        loss, _ = loss_of(model, slice(0, 4), "lean")
    loss.backward()
    return {"dtypes": seen, "gradients": {n: p.grad.dtype for n, p in model.named_parameters()}}


def on_two(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for placement in PLACEMENTS:
        tied = placement == "root"
        for head in HEADS:
            found[f"{placement}; {head}"] = run(placement, head, False)
            if tied:
                found[f"{placement}; {head}; tied"] = run(placement, head, True)
        found[f"{placement}; frozen"] = run(placement, "lean", False, frozen=True) if placement != "each" else None
        found[f"{placement}; statistics"] = statistics(placement)
        found[f"{placement}; hooks"] = [hooks(placement, head) for head in HEADS]
        found[f"{placement}; dtype"] = in_another_dtype(placement)
    return found


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(on_two, 2)


def zero_3(rank: int) -> dict[str, Any]:
    """Under DeepSpeed's ZeRO-3, every parameter partitioned; statistics, too, after a step."""
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", DEEPSPEED_LOG_LEVEL="error")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    found: dict[str, Any] = {}
    world = dist.get_world_size()
    share = B // world
    for head in HEADS:
        model = models.made("llama")
        config = {
            "train_micro_batch_size_per_gpu": share, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for step in range(2):
            loss, stats = loss_of(engine.module, slice(rank * share, (rank + 1) * share), head)
            engine.backward(world * loss)
            if step == 0:
                found[head] = {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters()}
                for group in engine.optimizer.optimizer.param_groups:
                    group["lr"] = 0.0
                engine.step()
                found[f"{head}; logp"] = stats.logp.detach()
            else:
                assert torch.equal(stats.logp.detach(), found[f"{head}; logp"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_zero_3(world: int) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: make test-ranks")
    for result in ranks.run(zero_3, world):
        for head in HEADS:
            models.assert_close(result[head], alone(head, tied=False), BOUND)


def alone(head: str, tied: bool, frozen: bool = False) -> dict[str, Tensor]:
    model = models.llama(tied)
    if frozen:
        model.model.requires_grad_(False)
    loss_of(model, slice(None), head)[0].backward()
    return models.gradients_of(model)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients(of_two: list[dict[str, Any]], placement: str, head: str) -> None:
    for tied in (False, True):
        name = f"{placement}; {head}" + "; tied" * tied
        if name in of_two[0]:
            want = alone(head, tied)
            for result in of_two:
                models.assert_close(result[name]["gradients"], want, BOUND)
                models.assert_close(result[name]["of two"], want, BOUND)


@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if p != "each"])
def test_a_trained_head_on_a_frozen_model(of_two: list[dict[str, Any]], placement: str) -> None:
    """Nothing but the head asks for a gradient."""
    want = alone("lean", tied=False, frozen=True)
    assert list(want) == ["lm_head.weight"]
    for result in of_two:
        models.assert_close(result[f"{placement}; frozen"]["gradients"], want, BOUND)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_was_gathered_is_not_stale(of_two: list[dict[str, Any]], placement: str) -> None:
    model = models.llama()
    with torch.no_grad():
        before = loss_of(model, slice(None), "fast")[1].logp
        for p in model.parameters():
            p.sub_(0.1)
        after = loss_of(model, slice(None), "fast")[1].logp
    for result in of_two:
        torch.testing.assert_close(result[f"{placement}; statistics"]["before"], before, rtol=0, atol=2e-6)
        torch.testing.assert_close(result[f"{placement}; statistics"]["after"], after, rtol=0, atol=2e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nothing_piles_up_and_nothing_is_copied(of_two: list[dict[str, Any]], placement: str) -> None:
    for result in of_two:
        for counts in result[f"{placement}; hooks"]:
            assert len(set(counts)) == 1, counts
        found = result[f"{placement}; dtype"]
        assert found["dtypes"] == [(torch.bfloat16, torch.bfloat16)]
        assert set(found["gradients"].values()) == {torch.float32}
