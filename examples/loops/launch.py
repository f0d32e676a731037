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


def run(description: str | None, train: Callable[[], tuple[torch.nn.Module, Any]]) -> None:
    """Train and leave; `--save FILE` keeps weights and history (rank 0's)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="FILE", help="weights and history, of rank 0")
    save = parser.parse_args().save
    model, history = train()
    if save and int(os.environ.get("RANK", 0)) == 0:
        torch.save({"model": model.state_dict(), "history": history}, save)
    del model
    leave()


def leave() -> None:
    """End the process group, for good: call it when model, optimizer and rate are out of reach.

    gloo's threads drop the tensors of a finished collective, which takes the interpreter's lock; one that asks for it while
    the interpreter ends aborts the process ("terminate called without an active exception"). They are joined with the last
    reference to the group, which `destroy_process_group` gives up, and DDP and hooks of optimizers hold in cycles.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
