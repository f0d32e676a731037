"""SequenceGradients under FSDP2 and HSDP: norms and gradients are those of one process that has the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import vcpo_kernels as vk
from tests import ranks
from tests.distributed import sharded_models as models
from tests.distributed.sharded_models import B, Rows

BOUND = 1e-6
CASES: dict[str, tuple[str, str, str, int]] = {  # model, placement, head, micro-batches a rank
    "root": ("tokens", "root", "logits", 1),
    "root, tied": ("tokens, tied", "root", "logits", 1),
    "each": ("tokens", "each", "logits", 2),
    "llama, blocks, logits": ("llama", "blocks", "logits", 1),
    "llama, blocks, fast": ("llama", "blocks", "fast", 1),
    "llama, blocks, lean": ("llama", "blocks", "lean", 2),
    "llama, tied, lean": ("llama, tied", "blocks", "lean", 1),
    "llama, tied, fast": ("llama, tied", "root", "fast", 2),
    "llama, each, lean": ("llama", "each", "lean", 1),
    "llama, the head alone, lean": ("llama", "head", "lean", 2),
    "llama, norm and head, lean": ("llama", "norm and head", "lean", 1),
    "llama, norm and head, kept, fast": ("llama", "norm and head, kept", "fast", 1),
}


def step(model: Any, name: str, head: str, rows: Rows, factor: int) -> dict[str, Any]:
    """Norms of this rank's sequences, and the gradients; two steps, so that what the first leaves shows."""
    x = models.batch(name)
    for _ in range(2):
        model.zero_grad()
        with vk.SequenceGradients(model) as grads:
            for part in rows.slices:
                stats = models.head_stats(model, x["ids"][part], x["mask"][part], head)
                segments = vk.Segments.padded(x["mask"][part])
                grads.backward(segments.sum(stats.logp), segments)
            norms = grads.squared_norms_by_parameter()
            grads.accumulate_(x["c"][rows.start : rows.stop] * factor)
    return {"norms": norms, "gradients": models.gradients_of(model)}


def run(case: tuple[str, str, str, int], mesh: Any = None) -> dict[str, Any]:
    name, placement, head, micro = case
    share = B // dist.get_world_size()
    first = dist.get_rank() * share
    model = models.sharded(name, placement, mesh)
    with torch.no_grad():
        model(models.batch(name)["ids"])  # leaves the root's parameters gathered
    found = step(model, name, head, Rows(first, first + share, share // micro), dist.get_world_size())
    return found | {"sharded": all(hasattr(p, "full_tensor") for p in model.parameters())}


def uneven_probes(rank: int) -> dict[str, Any]:
    """One sequence on the first rank, which needs no probe, 40 on the second, whose probe takes two backwards."""
    model, count = models.sharded("tokens", "root"), (1, 40)[rank]
    ids = torch.randint(3, 9, (count, 4), generator=torch.Generator().manual_seed(0))
    with vk.SequenceGradients(model) as grads:
        stats = vk.token_stats(model(ids), ids, shift=True)
        segments = vk.Segments.padded(torch.ones(count, 4))
        grads.backward(segments.sum(stats.logp), segments)
        return {"norms": grads.squared_norms()}


class Direct(nn.Module):
    """Uses a parameter beside its module's forward: known to the context (tied), or not."""

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.known = known

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids)
        if self.known:
            return nn.functional.linear(hidden, self.table.weight)
        return nn.functional.linear(hidden, self.head.weight)


def refusals() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model, mesh = models.made("tokens"), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    by_hand = distribute_tensor(model.up.weight.detach(), mesh, [Replicate(), Shard(0)])
    model.up.weight = nn.Parameter(by_hand)
    said = {
        "by hand": _message(lambda: vk.SequenceGradients(model)),
        "accumulator": _message(
            lambda: vk.OPOBAccumulator(models.sharded("tokens", "root").parameters(), vk.VCPOConfig())
        ),
    }
    for known in (True, False):
        model = fully_shard(Direct(known))
        ids = torch.zeros(2, 3, dtype=torch.int64)

        def use(model: nn.Module = model, ids: torch.Tensor = ids) -> None:
            with vk.SequenceGradients(model) as grads:
                stats = vk.token_stats(model(ids), ids, shift=True)
                segments = vk.Segments.padded(torch.ones(2, 3))
                grads.backward(segments.sum(stats.logp), segments)

        said[f"direct, {known}"] = _message(use)
    return said


def _message(call: Any) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        call()
    return f"{error.type.__name__}: {error.value}"


def on_two(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: run(case) for name, case in CASES.items()}
    return found | {"uneven probes": uneven_probes(rank), "refused": refusals()}


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(on_two, 2)


def check(case: tuple[str, str, str, int], of_ranks: list[dict[str, Any]]) -> None:
    name, _, head, _ = case
    want = step(models.made(name), name, head, Rows(0, B, B), 1)
    for parameter, norms in want["norms"].items():
        got = torch.cat([result["norms"][parameter] for result in of_ranks])
        assert float((got - norms).abs().max() / norms.max()) <= BOUND, parameter
    for result in of_ranks:
        models.assert_close(result["gradients"], want["gradients"], BOUND)
        assert result["sharded"]  # nothing is left gathered that a later step would find stale


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(of_two: list[dict[str, Any]], name: str) -> None:
    check(CASES[name], [result[name] for result in of_two])


def test_ranks_whose_probes_differ_take_as_many_backwards(of_two: list[dict[str, Any]]) -> None:
    """A rank that took fewer would gather other parameters than the rest, or none, for ever."""
    assert [len(result["uneven probes"]["norms"]) for result in of_two] == [1, 40]


def test_what_is_refused(of_two: list[dict[str, Any]]) -> None:
    said = of_two[0]["refused"]
    assert said["by hand"].startswith(
        "TypeError: SequenceGradients: parameter 'up.weight' is a DTensor with placements"
    )
    assert "OPOBAccumulator" not in said["by hand"]
    assert "DTensor" in said["accumulator"]
    assert "parameter 'table.weight' takes a gradient outside its own module's forward" in said["direct, True"]
    assert "that is not the model's" in said["direct, False"]


HSDP = {name: CASES[name] for name in ("root, tied", "each", "llama, blocks, lean")}


def on_four(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    found: dict[str, Any] = {f"HSDP, {name}": run(case, mesh) for name, case in HSDP.items()}
    return found | {name: run(case) for name, case in HSDP.items()}


@pytest.fixture(scope="module")
def of_four() -> list[dict[str, Any]]:
    return ranks.run(on_four, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HSDP, ", ""])
@pytest.mark.parametrize("name", HSDP)
def test_four_ranks(of_four: list[dict[str, Any]], kind: str, name: str) -> None:
    """HSDP on a 2 x 2 mesh; FSDP2 on four, where small parameters have empty parts."""
    check(HSDP[name], [result[kind + name] for result in of_four])
