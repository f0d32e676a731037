"""How the loops of this folder start, save and end, in one process or in several that torchrun has started."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# Before init_process_group: imported later (DistributedDataParallel does), its functions' default arguments hold the group
# until the interpreter ends, and `leave` is in vain.
import torch.distributed.nn

import vcpo_kernels as vk


def processes() -> int:
    """How many the launcher started, whatever it was asked for: 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def share(micro_batches: int, processes: int) -> int:
    """One process's part of a step's micro-batches. Raises ValueError where they do not come out even."""
    if micro_batches % processes:
        raise ValueError(
            f"the {micro_batches} micro-batches of a step cannot be divided among {processes} processes. "
            f"Start a number that divides {micro_batches}, or change PROMPTS_PER_STEP and MICRO_BATCH."
        )
    return micro_batches // processes


def start() -> None:
    """Join the processes that torchrun has started, if it has: by NCCL where there are GPUs, else by gloo."""
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def place() -> tuple[torch.device, int, int]:
    """This process's device, the number of processes, and which of them it is."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return (device, dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (device, 1, 0)


def report(step: int, ess_rate: vk.EssLearningRate) -> dict[str, float]:
    """ESS / B and the rate's scale of a step that was taken, printed by the first process."""
    assert ess_rate.ratio is not None
    assert ess_rate.scale is not None
    found = {"ess_ratio": ess_rate.ratio.item(), "scale": float(ess_rate.scale)}
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"step {step}: ESS/B {found['ess_ratio']:.3f}  rate x {found['scale']:.3f}")
    return found


def run(description: str | None, train: Callable[[], tuple[torch.nn.Module, Any]]) -> None:
    """Train and leave; `--save FILE` keeps weights and history (rank 0's)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="FILE", help="weights and history, of rank 0")
    save = parser.parse_args().save
    model, history = train()
    weights = whole_state(model) if save else {}
    if save and int(os.environ.get("RANK", 0)) == 0:
        torch.save({"model": weights, "history": history}, save)
    del model
    leave()


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's state with parameters whole that ranks share: a call that all of them make."""
    state = model.state_dict()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def leave() -> None:
    """End the process group, for good: call it when model, optimizer and rate are out of reach.

    gloo's threads drop the tensors of a finished collective, which takes the interpreter's lock; one that asks for it while
    the interpreter ends aborts the process ("terminate called without an active exception"). They are joined with the last
    reference to the group, which `destroy_process_group` gives up, and DDP and hooks of optimizers hold in cycles.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
