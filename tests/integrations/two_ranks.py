"""Two gloo ranks that run every loop of examples/loops once, and the attached rates, for several files of tests: starting the
ranks is what takes time.
"""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch

import vcpo_kernels as vk
from vcpo_kernels.core.checks import Check

# L_i of each rank's sequences; the second rank of "one observes nothing" has none, and must not be waited for.
ATTACHED = {"both observe": [[0.0, -1e4, -1e4], [0.0, 1.0]], "one observes nothing": [[0.0, -1e4, -1e4, -1e4], []]}


@functools.cache
def results() -> list[dict[str, Any]]:
    """Per rank and loop: "model" (state dict), "history" (ESS / B of each step). And "attached" (see `_attached`), "threads"
    (that are left).
    """
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
    from accelerate.state import AcceleratorState

    from examples.loops import accelerate_loop, ddp_loop, hugging_face_trainer, launch

    torch.distributed.init_process_group("gloo")
    saved: dict[str, Any] = {"attached": _attached(rank)}
    model, history = ddp_loop.train()
    saved["ddp"] = {"model": model.state_dict(), "history": [step["ess_ratio"] for step in history]}
    model, ratios = accelerate_loop.train(processes=2, cpu=True)
    saved["accelerate"] = {"model": model.state_dict(), "history": ratios}
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = hugging_face_trainer.make_trainer(f"{folder}/out", processes=2)
    trainer.train()
    history = [log["vcpo/ess_ratio"] for log in trainer.state.log_history if "vcpo/ess_ratio" in log]
    saved["trainer"] = {"model": trainer.accelerator.unwrap_model(trainer.model).state_dict(), "history": history}
    del model, trainer
    launch.leave()
    saved["threads"] = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    torch.save(saved, Path(folder) / f"rank{rank}.pt")


def _attached(rank: int) -> dict[str, list[float]]:
    """For each case of ATTACHED, ESS / B by a rate attached at once (verl's optimizer), and by one at its first step."""
    from vcpo_kernels.integrations import _ess_channel
    from vcpo_kernels.integrations.verl import EssAdamW

    seen: dict[str, list[float]] = {}
    for case, per_rank in ATTACHED.items():
        log_weights = torch.tensor(per_rank[rank])
        seen[case] = []
        for later in (False, True):
            weight = torch.nn.Parameter(torch.zeros(1))
            if later:
                _ess_channel.attach_to_next_optimizer()
            optimizer = torch.optim.AdamW([weight]) if later else EssAdamW([weight])
            if len(log_weights):
                announce(weight, log_weights).backward()
            weight.grad = torch.ones(1)
            optimizer.step()
            (rate,) = _ess_channel.attached()
            assert rate.ratio is not None
            seen[case].append(rate.ratio.item())
            _ess_channel.detach(rate)
    return seen


def announce(weight: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """A loss of one-token sequences with the given L_i, announced to whatever is attached."""
    from vcpo_kernels.integrations import _ess_channel
    from vcpo_kernels.integrations._given_advantages import weighted_advantages

    logp = weight + torch.zeros(log_weights.numel(), 1)
    mu = logp.detach() - log_weights[:, None]
    segments = vk.Segments.padded(torch.ones_like(logp))
    result = weighted_advantages(Check("test"), logp, mu, torch.ones_like(logp), segments, 8.0)
    loss = result.surrogate(logp).sum()
    _ess_channel.publish("test", result, loss, "Attach one.")
    return loss


def same(loop: str, model: torch.nn.Module, history: list[float]) -> None:
    """Both ranks hold the same weights to the bit, and ESS and weights are those of one process on the same data."""
    first, second = (rank[loop] for rank in results())
    assert first["history"] == second["history"]
    assert len(first["history"]) == len(history) == 4
    torch.testing.assert_close(first["history"], history, rtol=1e-4, atol=0)
    for name, weight in model.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
