"""Results travel: pytrees for what maps over a module's outputs, `.to`, pickle, deepcopy."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import vcpo_kernels as vk
from vcpo_kernels import objectives


def results() -> dict[str, Any]:
    ids = torch.randint(0, 7, (4, 5))
    with torch.no_grad():
        stats = vk.token_stats(torch.randn(4, 5, 7), ids, torch.ones(4, 5), shift=True)
        seg = vk.Segments.padded(torch.ones(4, 5))
        mu = stats.logp - 0.1
        return {
            "TokenStats": stats,
            "padded": seg,
            "packed": vk.Segments.packed(torch.tensor([0, 2, 5])),
            "indexed": vk.Segments.indexed(torch.tensor([[1, 0, 1]]), 2),
            "VCPOOutput": vk.vcpo_loss(stats, mu, torch.rand(4), 2, seg),
            "ObjectiveOutput": objectives.cispo(stats, mu, torch.randn(4), seg, entropy_coefficient=0.1),
            "EffectiveSampleSize": vk.effective_sample_size(torch.zeros(4)),
        }


@pytest.fixture(params=results())
def result(request: pytest.FixtureRequest) -> Any:
    return results()[request.param]


def same(a: Any, b: Any) -> bool:
    left, right = pytree.tree_flatten(a), pytree.tree_flatten(b)
    equal = (
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(left[0], right[0], strict=True)
    )
    return type(a) is type(b) and left[1] == right[1] and all(equal)


def test_a_pytree_of_all_its_tensors(result: Any) -> None:
    """What is no tensor stays, and is part of the structure."""
    leaves, structure = pytree.tree_flatten(result)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) >= 1
    assert all(isinstance(leaf, torch.Tensor) or leaf is None for leaf in leaves)
    assert same(pytree.tree_unflatten(leaves, structure), result)
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t + t if t.is_floating_point() else t, result)
    assert type(doubled) is type(result)


def test_to_moves_every_tensor(result: Any) -> None:
    moved = result.to("meta", non_blocking=True)
    assert type(moved) is type(result)
    assert all(leaf is None or leaf.device.type == "meta" for leaf in pytree.tree_leaves(moved))
    assert same(result.to("cpu"), result)


def test_accelerate_moves_them() -> None:
    operations = pytest.importorskip("accelerate.utils.operations", reason="accelerate is not installed")
    for value in results().values():
        moved = operations.send_to_device({"a": value}, torch.device("meta"))["a"]
        assert all(leaf is None or leaf.device.type == "meta" for leaf in pytree.tree_leaves(moved))


def test_pickle_deepcopy_and_save(result: Any) -> None:
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result), torch.load(file, weights_only=False)):
        assert same(again, result)


def test_moved_statistics_still_know_their_shift() -> None:
    """`segments.mean(stats.logp)` divides by what was predicted, wherever the statistics have been."""
    value = results()
    stats, seg = value["TokenStats"], value["padded"]
    for again in (stats.to("cpu"), pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats)):
        torch.testing.assert_close(seg.mean(again.logp), stats.logp[:, 1:].mean(1))
