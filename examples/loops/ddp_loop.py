"""VCPO in a plain PyTorch loop with DistributedDataParallel and gradient accumulation.

    python -m examples.loops.ddp_loop
    torchrun --nproc-per-node 2 -m examples.loops.ddp_loop    # the same steps on two processes: same ESS, same weights

docs/ddp.md explains it line by line.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vcpo_kernels as vk
from examples.loops import launch, rollouts

STEPS, PROMPTS_PER_STEP, MICRO_BATCH = 4, 8, 2  # prompts; each has rollouts.SAMPLES responses


def train() -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """The trained model, and ESS and loss of each step."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model: Any = rollouts.tiny_model()
    if ranks > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # ESS is taken over all ranks, which step together.
    ess_rate = vk.EssLearningRate(optimizer, process_group=dist.group.WORLD if ranks > 1 else None)
    # 1/B of the whole step, whatever of it lies in this micro-batch on this rank.
    config = vk.VCPOConfig(num_sequences=PROMPTS_PER_STEP * rollouts.SAMPLES)
    data, history = rollouts.StalePrompts(STEPS * PROMPTS_PER_STEP), []

    for step in range(STEPS):
        mine = [data[i] for i in range(step * PROMPTS_PER_STEP + rank, (step + 1) * PROMPTS_PER_STEP, ranks)]
        micro_batches = [rollouts.collate(mine[i : i + MICRO_BATCH]) for i in range(0, len(mine), MICRO_BATCH)]
        step_loss = torch.zeros(())
        for batch in micro_batches:
            last = batch is micro_batches[-1]
            with contextlib.nullcontext() if last or ranks == 1 else model.no_sync():
                logits = model(batch["ids"]).logits
                stats = vk.token_stats(logits, batch["ids"], batch["mask"], shift=True, inplace_backward=True)
                segments = vk.Segments.padded(batch["mask"])
                out = vk.vcpo_loss(stats, batch["behavior_logp"], batch["rewards"], rollouts.SAMPLES, segments, config)
                (out.loss * ranks).backward()  # DDP takes the mean over ranks; k_i above wants the sum
            ess_rate.observe(out)  # once per micro-batch, on every rank
            step_loss += out.loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # at lr * sqrt(ESS / B), restored afterwards
        optimizer.zero_grad()
        if ranks > 1:
            dist.all_reduce(step_loss)
        assert ess_rate.ratio is not None
        history.append({"ess_ratio": ess_rate.ratio.item(), "loss": step_loss.item()})
        if rank == 0:
            print(f"step {step}: ESS/B {history[-1]['ess_ratio']:.3f}  loss {history[-1]['loss']:+.4f}")
    return model.module if ranks > 1 else model, history


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # "nccl" on GPUs
    launch.run(__doc__, train)


if __name__ == "__main__":
    main()
