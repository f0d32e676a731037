"""Two gloo ranks that run every loop of examples/loops once, for the tests of all three (starting them is what takes time)."""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch

LOOPS = ("ddp", "accelerate", "trainer")


@functools.cache
def results() -> list[dict[str, Any]]:
    """Per rank and loop: "model" (state dict), "history" (ESS / B of each step)."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(_rank, args=(folder, port), nprocs=2)
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]


def _rank(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo")
    from accelerate.state import AcceleratorState

    from examples.loops import accelerate_loop, ddp_loop, hugging_face_trainer

    saved: dict[str, Any] = {}
    model, history = ddp_loop.train()
    saved["ddp"] = {"model": model.state_dict(), "history": [step["ess_ratio"] for step in history]}
    model, ratios = accelerate_loop.train(processes=2, cpu=True)
    saved["accelerate"] = {"model": model.state_dict(), "history": ratios}
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = hugging_face_trainer.make_trainer(f"{folder}/out", processes=2)
    trainer.train()
    history = [log["vcpo/ess_ratio"] for log in trainer.state.log_history if "vcpo/ess_ratio" in log]
    saved["trainer"] = {"model": trainer.accelerator.unwrap_model(trainer.model).state_dict(), "history": history}
    torch.save(saved, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def same(loop: str, model: torch.nn.Module, history: list[float]) -> None:
    """Both ranks hold the same weights to the bit, and ESS and weights are those of one process on the same data."""
    first, second = (rank[loop] for rank in results())
    assert first["history"] == second["history"]
    assert len(first["history"]) == len(history) == 4
    torch.testing.assert_close(first["history"], history, rtol=1e-4, atol=0)
    for name, weight in model.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
