"""docs/parallel.md: its snippet as printed, on two ranks that share sequences, is the step of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import vcpo_kernels as vk
from tests import ranks
from tests.distributed.batches import B, T, V, whole
from tests.docs.pages import snippets


def step(rank: int | None) -> tuple[torch.Tensor, float]:
    """The model's gradient summed over ranks, and ESS / B as the optimizer's step took it. rank None: of one process."""
    (code,) = snippets("docs/parallel.md")
    x = whole()
    tokens = slice(None) if rank is None else slice(rank * T // 2, (rank + 1) * T // 2)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Embedding(V, 5), torch.nn.Linear(5, V))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    names: dict[str, Any] = {
        "vk": vk, "init_device_mesh": init_device_mesh, "model": model, "groups": 2, "rewards": x["rewards"],
        "ids": x["ids"][:, tokens], "labels": x["ids"].roll(-1, 1)[:, tokens], "mask": x["mask"][:, tokens],
        "behavior_logp": x["mu"][:, tokens], "ess_rate": vk.EssLearningRate(optimizer),
    }  # fmt: skip
    if rank is None:
        names["ranks"] = None
        code = "".join(line for line in code.splitlines(True) if not line.startswith(("mesh", "ranks")))
        code = code.replace(", sequence_group=ranks.sequence", "")
    exec(code, names)
    optimizer.step()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if rank is not None:
        torch.distributed.all_reduce(gradient)
        gradient /= 2  # as DDP averages
    return gradient, float(names["ess_rate"].ratio)


def test_the_snippet() -> None:
    gradient, ratio = step(None)
    for got, of_rank in ranks.run(step, 2):
        torch.testing.assert_close(got, gradient, atol=1e-6, rtol=1e-5)
        assert of_rank == pytest.approx(ratio, rel=1e-6)
    assert 0 < ratio < 1
    assert gradient.numel() == 5 * V + 5 * V + V
    assert B == 8
