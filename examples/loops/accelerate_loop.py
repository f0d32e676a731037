"""VCPO in an Accelerate loop: `accumulate`, `backward`, and an optimizer that `prepare` has wrapped.

    python -m examples.loops.accelerate_loop
    torchrun --nproc-per-node 2 -m examples.loops.accelerate_loop    # half the micro-batches a process

docs/accelerate.md explains it line by line.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader

import vcpo_kernels as vk
from examples.loops import launch, rollouts

STEPS, PROMPTS_PER_STEP, MICRO_BATCH = 4, 8, 2  # prompts; each has rollouts.SAMPLES responses


def train(processes: int = 1, **accelerator_options: Any) -> tuple[torch.nn.Module, list[float]]:
    """The trained model, and each step's ESS / B. PROMPTS_PER_STEP are divided among `processes`."""
    accelerator = Accelerator(
        gradient_accumulation_steps=launch.share(PROMPTS_PER_STEP // MICRO_BATCH, processes), **accelerator_options
    )
    model: Any = rollouts.tiny_model()
    data = DataLoader(
        rollouts.StalePrompts(STEPS * PROMPTS_PER_STEP), MICRO_BATCH, collate_fn=rollouts.collate, drop_last=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # The hooks go onto the optimizer that steps, not onto the wrapper that prepare() makes of it.
    ess_rate = vk.EssLearningRate(optimizer, process_group=dist.group.WORLD if accelerator.num_processes > 1 else None)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    # backward() divides by the number of micro-batches and DDP by that of the processes: 1/B of one micro-batch is left.
    config = vk.VCPOConfig(num_sequences=MICRO_BATCH * rollouts.SAMPLES)
    history = []

    for batch in data:
        with accelerator.accumulate(model):
            logits = model(batch["ids"]).logits
            stats = vk.token_stats(logits, batch["ids"], batch["mask"], shift=True)
            segments = vk.Segments.padded(batch["mask"])
            out = vk.vcpo_loss(stats, batch["behavior_logp"], batch["rewards"], rollouts.SAMPLES, segments, config)
            accelerator.backward(out.loss)
            ess_rate.observe(out)  # once per micro-batch, on every process
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()  # does nothing before the last micro-batch
            optimizer.zero_grad()
        if accelerator.sync_gradients and ess_rate.ratio is not None:
            history.append(ess_rate.ratio.item())
            accelerator.print(f"step {len(history)}: ESS/B {history[-1]:.3f}")
    return accelerator.unwrap_model(model), history


def main() -> None:
    launch.run(__doc__, lambda: train(launch.processes(), cpu=True))


if __name__ == "__main__":
    main()
