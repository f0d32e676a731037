"""Tensors whose values are not all here, or not what lies in memory: every public function names the argument and a way out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels import objectives as ob

B, T, V, H = 4, 5, 7, 6


class Int8(Tensor):
    """Weight-only int8 as quantisers write it: a wrapper that has no memory of its own dtype."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __repr__(self) -> str:
        return "Int8()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        raise NotImplementedError(f"Int8 has no {func}")


def distributed(values: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(values, init_device_mesh("cpu", (1,)), [Shard(0)])


def freed(values: Tensor) -> Tensor:
    values = values.clone()
    values.untyped_storage().resize_(0)
    return values


def partitioned(values: Tensor) -> Tensor:
    out = torch.empty(0, dtype=values.dtype)
    out.ds_id, out.ds_shape = 0, values.shape  # type: ignore[attr-defined]
    return out


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "DTensor": (distributed, "is a DTensor.*(full_tensor|to_local)"),
    "quantised": (Int8, "is a tensor subclass, .*Int8"),
    "freed": (freed, "has no memory: FSDP"),
    "ZeRO-3": (partitioned, r"is DeepSpeed ZeRO-3's, of whole shape \("),
    "sparse": (lambda values: values.to_sparse(), "has layout torch.sparse_coo.*to_dense"),
}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A public function and its arguments, those that are tensors to be replaced one by one."""
    logits, ids, mask = torch.randn(B, T, V), torch.randint(0, V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    c = torch.randn(B, T)
    stats, segments = vk.token_stats(logits, ids), vk.Segments.padded(mask)
    of_head = {"hidden": torch.randn(B, T, H), "weight": torch.randn(V, H), "bias": torch.randn(V)}
    of_head |= {"token_ids": ids, "mask": mask}
    common = {"behavior_logp": c - 3, "rewards": torch.rand(B), "groups": torch.tensor([0, 0, 1, 1])}
    sequence = {"log_weights": torch.zeros(B), "rewards": torch.rand(B), "groups": torch.tensor([0, 0, 1, 1])}
    out = {
        "token_stats": (vk.token_stats, {"logits": logits, "token_ids": ids, "mask": mask}),
        "weighted_logp": (vk.weighted_logp, {"logits": logits, "token_ids": ids, "coefficients": c, "mask": mask}),
        "linear_token_stats": (vk.linear_token_stats, of_head),
        "linear_weighted_logp": (vk.linear_weighted_logp, of_head | {"coefficients": c}),
        "Segments.padded": (vk.Segments.padded, {"mask": mask}),
        "Segments.packed": (vk.Segments.packed, {"cu_seqlens": torch.tensor([0, 2, 5]), "mask": mask[:1]}),
        "Segments.indexed": (
            vk.Segments.indexed,
            {"segment_id": torch.zeros(B, T, dtype=torch.int64), "num_sequences": 1, "mask": mask},
        ),
        "segments.sum": (segments.sum, {"values": c}),
        "segments.spread": (segments.spread, {"per_sequence": torch.rand(B)}),
        "vcpo_loss": (vk.vcpo_loss, {"stats": stats, **common, "segments": segments}),
        "sequence_log_weights": (
            vk.sequence_log_weights, {"logp": c, "behavior_logp": c, "segments": segments},
        ),
        "effective_sample_size": (
            vk.effective_sample_size, {"log_weights": torch.zeros(B), "valid": torch.ones(B, dtype=torch.bool)},
        ),
        "off_policy_baseline": (vk.off_policy_baseline, sequence | {"score_sqnorm": torch.rand(B)}),
        "opob_advantages": (ob.opob_advantages, sequence | {"score_sqnorm": torch.rand(B)}),
        "optimal_token_advantages": (
            ob.optimal_token_advantages,
            {"rewards": common["rewards"], "groups": 2, "stats": stats, "segments": segments, "token_weights": c.exp()},
        ),
        "group_mean_advantages": (ob.group_mean_advantages, {"rewards": torch.rand(B), "groups": common["groups"]}),
    }  # fmt: skip
    for name, entry in ob.OBJECTIVES.items():
        function = getattr(entry, "function", entry)
        arguments = {"stats": stats, "behavior_logp": c - 3, "advantages": torch.rand(B), "segments": segments}
        if "proximal_logp" in inspect.signature(function).parameters:
            arguments["proximal_logp"] = c - 3
        out[name] = (function, arguments)
    return out


CASES = [
    (name, argument)
    for name, (_, arguments) in calls().items()
    for argument, value in arguments.items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_the_argument_is_named(name: str, argument: str, kind: str) -> None:
    function, arguments = calls()[name]
    function(**arguments)
    make, message = KINDS[kind]
    with pytest.raises(TypeError, match=f"(?s)^[a-zA-Z0-9_.]+: {argument}.*{message}"):
        function(**arguments | {argument: make(arguments[argument])})
