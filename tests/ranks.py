"""Processes that are the ranks of one gloo group, for every test of several ranks."""

from __future__ import annotations

import datetime
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)  # of a collective that a rank waits in


def run(
    function: Callable[..., Any], world: int, *arguments: Any, group: bool = True, barrier: bool = True
) -> list[Any]:
    """What function(rank, *arguments) returned on each of `world` ranks; raises where one did.

    group: with the default process group initialised. barrier: each rank waits for the others before it ends.

    Starting the processes takes seconds: one call a file of tests.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(_rank, (function, world, port, folder, arguments, group, barrier), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(
    rank: int,
    function: Callable[..., Any],
    world: int,
    port: int,
    folder: str,
    arguments: Any,
    group: bool,
    barrier: bool,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    try:
        if group:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
        if group and barrier:
            dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Without the interpreter's end: one of gloo's threads that still drops a tensor then would abort the process
    # (examples/loops/launch.py ends as a training loop should).
    os._exit(0)
