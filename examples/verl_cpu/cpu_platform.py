"""A CPU in the place of verl's accelerators: what its FSDP engine and its Ray workers ask of one.

verl 0.9 has a registry of platforms (VERL_PLATFORM picks one) and one of engines by device; this fills both. Nothing here is
VCPO's: with a GPU leave it out.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

SHOWN_MEMORY = 1 << 34  # what verl logs as the device's


def _nothing(*args: Any, **kwargs: Any) -> None:
    """For what a CPU has no need of."""


def _device_module() -> types.ModuleType:
    """In torch.cuda's place."""
    module = types.ModuleType("cpu_device")
    for name in ("is_available", "device_count", "current_device", "current_stream", "stream", "synchronize"):
        setattr(module, name, getattr(torch.cpu, name))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *args: 0)
    for name in ("empty_cache", "ipc_collect", "set_device"):
        setattr(module, name, _nothing)
    vars(module).update(
        mem_get_info=lambda *args: (SHOWN_MEMORY, SHOWN_MEMORY),
        get_device_name=lambda *args: "CPU",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )
    return module


class CpuPlatform(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = _device_module()

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")  # an index would be a GPU's

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "GPU"  # Ray's token for a worker's place: `ray.init(num_gpus=2)` makes two

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False


def register() -> None:
    """In verl's registries; a second call changes nothing."""
    PlatformRegistry.register(platform="cpu")(CpuPlatform)
    from verl.utils import distributed

    # verl asks for "cpu:gloo,<device>:<backend>", which would name the CPU twice.
    distributed.initialize_global_process_group_ray = functools.partial(
        distributed.initialize_global_process_group_ray, backend="gloo"
    )
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    if "cpu" not in EngineRegistry._engines["language_model"]["fsdp2"]:
        EngineRegistry.register("language_model", "fsdp2", device="cpu")(FSDPEngineWithLMHead)
