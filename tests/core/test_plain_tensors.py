"""Tensors whose values are not all here, or not what lies in memory: every public function names the argument and a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.core.public_calls import calls


class Int8(Tensor):
    """Weight-only int8 as quantisers write it: a wrapper that has no memory of its own dtype."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __repr__(self) -> str:
        return "Int8()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # as nn.Parameter asks
            return Int8(args[0])
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", calls())
def test_the_argument_is_named(name: str, kind: str) -> None:
    """Each in its turn, the others as they should be."""
    function, arguments = calls()[name]
    make, message = KINDS[kind]
    function(**arguments)
    for argument, value in arguments.items():
        if isinstance(value, Tensor):
            with pytest.raises(TypeError, match=f"(?s)^[a-zA-Z0-9_.]+: {argument}.*{message}"):
                function(**arguments | {argument: make(value)})
