"""Groups by the names of a mesh, shards of a vocabulary, and the collectives with their gradients, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import vcpo_kernels as vk
from tests import ranks
from tests.distributed.batches import message_of
from vcpo_kernels.parallel import collectives

WORLD = 2


def on_rank(rank: int) -> dict[str, Any]:
    """Everything that needs two ranks, once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    group = dist.group.WORLD
    mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    found = vk.Ranks.of(mesh)
    flat = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    uneven = distribute_tensor(torch.arange(15.0).view(5, 3), flat, [Shard(0)])
    rows = torch.arange(6.0).view(3, 2)[: rank + 1] + 10 * rank
    value = torch.tensor([1.0 + rank], requires_grad=True)
    (collectives.summed(value * value, group) * 3).sum().backward()
    return {
        "sizes": [1 if g is None else dist.get_world_size(g) for g in (found.data, found.sequence, found.vocabulary)],
        "factors": (vk.Ranks.of(mesh, averaged=True).loss_factor, found.loss_factor),
        "even": vars(vk.VocabularyShard.even(group, 4, 7)) | {"group": None},
        "width": vk.VocabularyShard.even(group, 4, 7).width(4),
        "uneven": (vk.VocabularyShard.of_dtensor(uneven, 0).start, vk.VocabularyShard.of_dtensor(uneven, -2).size),
        "replicated": message_of(lambda: vk.VocabularyShard.of_dtensor(uneven.redistribute(flat, [Replicate()]), 0)),
        "other dimension": message_of(lambda: vk.VocabularyShard.of_dtensor(uneven, 1)),
        "too large": message_of(lambda: vk.VocabularyShard.even(group, 4, 9)),
        "rows": collectives.gathered_rows(rows, group, uneven=True),
        "equal rows": collectives.gathered_rows(rows[:1], group),
        "gradient": value.grad,
        "of a mesh dimension": message_of(lambda: vk.Ranks(data=flat)),
        "unknown": message_of(lambda: vk.Ranks.of(init_device_mesh("cpu", (2,), mesh_dim_names=("pepper",)))),
        "nameless": message_of(lambda: vk.Ranks.of(init_device_mesh("cpu", (2,)))),
    }


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    return ranks.run(on_rank, WORLD)


def test_groups_by_the_names_of_a_mesh(both: list[dict[str, Any]]) -> None:
    for result in both:
        assert result["sizes"] == [2, 1, 1]
        assert result["factors"] == (2, 1)
        assert result["unknown"].startswith("ValueError: Ranks.of: mesh must have dimensions of batch, cp, ddp")
        assert "got 'pepper' too" in result["unknown"]
        assert "without names" in result["nameless"]
        assert result["of a mesh dimension"].startswith(
            "TypeError: Ranks: data must be a torch.distributed process group"
        )
        assert "Ranks.of(mesh)" in result["of a mesh dimension"]


def test_shards_of_a_vocabulary(both: list[dict[str, Any]]) -> None:
    """Megatron's even ones with padding at the end, a DTensor's uneven ones."""
    first, second = both
    assert first["even"] == {"group": None, "start": 0, "size": 7}
    assert second["even"] == {"group": None, "start": 4, "size": 7}
    assert (first["width"], second["width"]) == (4, 3)
    assert (first["uneven"], second["uneven"]) == ((0, 5), (3, 5))
    assert "sharded once in dimension 0, got placements (Replicate()" in first["replicated"]
    assert "sharded once in dimension 1" in first["other dimension"]
    assert "size must be at most the shards' 8 entries (4 a rank), got 9" in first["too large"]


def test_rows_of_all_ranks(both: list[dict[str, Any]]) -> None:
    """In the order of the ranks, the same bits on all, whatever each has."""
    want = torch.tensor([[0.0, 1.0], [10.0, 11.0], [12.0, 13.0]])
    for rank, result in enumerate(both):
        got = result["rows"]
        assert torch.equal(got.rows, want)
        assert got.mine == (slice(0, 1), slice(1, 3))[rank]
        assert got.first.tolist() == [0, 1, 1]
        got = result["equal rows"]
        assert torch.equal(got.rows, want[:2])
        assert got.mine == slice(rank, rank + 1)
        assert got.first.tolist() == [0, 1]


def test_a_sums_gradient_is_each_ranks_own(both: list[dict[str, Any]]) -> None:
    """d/dv of 3 (v_0^2 + v_1^2), which every rank has whole: 6 v_r on rank r, and the sum over the ranks counts it once."""
    assert [result["gradient"].item() for result in both] == [6.0, 12.0]


def test_no_group_is_one_rank() -> None:
    rows = torch.ones(2, 3)
    assert collectives.gathered_rows(rows, None).rows is rows
    assert collectives.summed(rows, None) is rows
    assert torch.equal(collectives.gathered(rows, None), rows[None])
    with pytest.raises(TypeError, match=r"VocabularyShard: group must be a torch.distributed process group, got None"):
        vk.VocabularyShard(None, 0, 5)
    with pytest.raises(TypeError, match=r"Ranks.of: mesh must be a torch.distributed DeviceMesh, got 3"):
        vk.Ranks.of(3)
