"""VCPO in a plain PyTorch loop with tensor and sequence parallelism: the ranks have the same prompts, each its part of every
weight, of the vocabulary, and between the Linears of the tokens.

    python -m examples.loops.tensor_parallel
    torchrun --nproc-per-node 2 -m examples.loops.tensor_parallel    # same ESS, same weights

The logits stay sharded: `token_stats` takes them as they are. Statistics, and so loss and ESS, are the same on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import vcpo_kernels as vk
from examples.loops import launch, rollouts
from examples.loops.small_model import LAYERS, small_model

STEPS, PROMPTS_PER_STEP = 4, 8  # prompts; each has rollouts.SAMPLES responses


def plan() -> dict[str, Any]:
    """As torchtitan's: activations are split by tokens but inside attention and feed-forward."""
    whole_input = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    of_block = {
        "norm1": SequenceParallel(),
        "attention": whole_input,
        **{f"attention.{name}": ColwiseParallel() for name in ("q", "k", "v")},
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "norm2": SequenceParallel(),
        "feed_forward": whole_input,
        "feed_forward.up": ColwiseParallel(),
        "feed_forward.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    return {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        **{f"blocks.{i}.{name}": style for i in range(LAYERS) for name, style in of_block.items()},
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    }


def train() -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """The trained model, and ESS / B and the rate's scale of each step."""
    device, processes, _ = launch.place()
    model: Any = small_model().to(device)
    if processes > 1:
        mesh = init_device_mesh(device.type, (processes,), mesh_dim_names=("tp",))
        model = parallelize_module(model, mesh, plan())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ess_rate = vk.EssLearningRate(optimizer)
    data, history = rollouts.StalePrompts(STEPS * PROMPTS_PER_STEP, of=small_model), []

    for step in range(STEPS):
        prompts = [data[i] for i in range(step * PROMPTS_PER_STEP, (step + 1) * PROMPTS_PER_STEP)]  # on every rank
        batch = {name: values.to(device) for name, values in rollouts.collate(prompts).items()}
        logits = model(batch["ids"]).logits  # a DTensor: this rank's entries of the vocabulary
        stats = vk.token_stats(logits, batch["ids"], batch["mask"], shift=True, inplace_backward=True)
        segments = vk.Segments.padded(batch["mask"])
        out = vk.vcpo_loss(stats, batch["behavior_logp"], batch["rewards"], rollouts.SAMPLES, segments)
        out.loss.backward()
        ess_rate.observe(out)
        optimizer.step()  # at lr * sqrt(ESS / B), restored afterwards
        optimizer.zero_grad()
        history.append(launch.report(step, ess_rate))
    return model, history


if __name__ == "__main__":
    launch.start()
    launch.run(__doc__, train)
