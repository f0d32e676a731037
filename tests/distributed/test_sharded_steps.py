"""EssLearningRate on the optimizers of many ranks: FSDP2's, ZeroRedundancyOptimizer, DeepSpeed's: every parameter goes at the
factor of all ranks' ESS.
"""

from __future__ import annotations

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

RATE = 0.1
LOG_WEIGHTS = torch.tensor([0.0, -1.0, 0.5, -2.0, 1.0, -0.5, -3.0, 0.2])
FACTOR = float(vk.effective_sample_size(LOG_WEIGHTS).ratio ** 0.5)


def rows() -> slice:
    share = B // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def loss_of(call: Any, part: slice) -> Tensor:
    x = models.batch("llama")
    stats = vk.token_stats(call(x["ids"][part]).logits, x["ids"][part], x["mask"][part], shift=True)
    return (x["c"][part, None] * stats.logp).sum()


def moved(model: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: before[n] - models.whole_of(p.detach()) for n, p in model.named_parameters()}


def fsdp2() -> dict[str, Tensor]:
    model = models.sharded("llama", "blocks")
    before = {n: models.whole_of(p.detach()).clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rate = vk.EssLearningRate(optimizer, process_group=dist.group.WORLD)
    (dist.get_world_size() * loss_of(model, rows())).backward()
    rate.observe(LOG_WEIGHTS[rows()])
    optimizer.step()
    model.reshard()
    return moved(model, before)


def redundancy(groups: int) -> dict[str, Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = models.llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameters: Any = list(model.parameters())
    optimizer = ZeroRedundancyOptimizer(parameters[:2] if groups == 2 else parameters, torch.optim.SGD, lr=RATE)
    if groups == 2:
        optimizer.add_param_group({"params": parameters[2:]})
    rate = vk.EssLearningRate(optimizer, process_group=dist.group.WORLD)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    (dist.get_world_size() * loss_of(ddp, rows())).backward()
    rate.observe(LOG_WEIGHTS[rows()])
    optimizer.step()
    assert all(group["lr"] == RATE for group in optimizer.param_groups)
    return moved(model, before)


def deepspeed_step(stage: int, groups: int, sub_group_size: int, steps: int = 2) -> list[dict[str, Tensor]]:
    import deepspeed

    def whole(p: Tensor) -> Tensor:
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            return p.detach().clone()

    model = models.llama()
    named = list(model.named_parameters())
    norms = [p for n, p in named if "norm" in n]
    rest = [p for n, p in named if "norm" not in n]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": norms}] if groups == 2 else [*rest, *norms], lr=RATE)
    zero = {"stage": stage, "sub_group_size": sub_group_size, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": B // dist.get_world_size(), "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rate = vk.EssLearningRate(engine.optimizer.optimizer, process_group=dist.group.WORLD)
    found = []
    for _ in range(steps):
        before = {n: whole(p) for n, p in model.named_parameters()}
        engine.backward(dist.get_world_size() * loss_of(engine, rows()))
        rate.observe(LOG_WEIGHTS[rows()])
        engine.step()
        found.append({n: before[n] - whole(p) for n, p in model.named_parameters()})
    return found


DEEPSPEED = {"ZeRO-1": (1, 1, 10**9), "ZeRO-2, two groups": (2, 2, 10**9), "ZeRO-3": (3, 1, 10**9),
             "ZeRO-3, two groups, small sub-groups": (3, 2, 3000)}  # fmt: skip


def on_two(rank: int) -> dict[str, Any]:
    return {"FSDP2": fsdp2(), "ZeroRedundancy": redundancy(1), "ZeroRedundancy, two groups": redundancy(2)}


def deepspeed_on_rank(rank: int) -> dict[str, Any]:
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", DEEPSPEED_LOG_LEVEL="error")
    return {name: deepspeed_step(*case) for name, case in DEEPSPEED.items()}


def alone(steps: int = 1) -> list[dict[str, Tensor]]:
    """One process, at FACTOR times the rate."""
    model, found = models.llama(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE * FACTOR)
    for _ in range(steps):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        loss_of(model, slice(None)).backward()
        optimizer.step()
        found.append(moved(model, before))
    return found


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(on_two, 2)


@pytest.mark.parametrize("name", ["FSDP2", "ZeroRedundancy", "ZeroRedundancy, two groups"])
def test_two_ranks(of_two: list[dict[str, Any]], name: str) -> None:
    for result in of_two:
        models.assert_close(result[name], alone()[0], 2e-6)


@pytest.fixture(scope="module", params=[2, 4])
def of_deepspeed(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: make test-ranks")
    return ranks.run(deepspeed_on_rank, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed(of_deepspeed: list[dict[str, Any]], name: str) -> None:
    """On two and four ranks: its engine steps the inner optimizer once for each group, or sub-group."""
    for result in of_deepspeed:
        for got, want in zip(result[name], alone(2), strict=True):
            models.assert_close(got, want, 5e-6)
