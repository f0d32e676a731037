"""VCPO in a plain PyTorch loop with FSDP2 (fully_shard): every rank has other prompts, and a part of every parameter.

    python -m examples.loops.fsdp2
    torchrun --nproc-per-node 2 -m examples.loops.fsdp2    # the same steps on two processes: same ESS, same weights

Baselines, ESS and k_i are the whole step's by `ranks=`, in one gather.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vcpo_kernels as vk
from examples.loops import launch, rollouts

STEPS, PROMPTS_PER_STEP = 4, 8  # prompts; each has rollouts.SAMPLES responses


def train() -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """The trained model, and ESS / B and the rate's scale of each step."""
    device, processes, rank = launch.place()
    model: Any = rollouts.tiny_model()
    model.to(device)
    ranks = vk.Ranks()
    if processes > 1:
        mesh = init_device_mesh(device.type, (processes,), mesh_dim_names=("dp_shard",))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        ranks = vk.Ranks.of(mesh, averaged=True)  # FSDP2 averages gradients
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ess_rate = vk.EssLearningRate(optimizer)
    data, history = rollouts.StalePrompts(STEPS * PROMPTS_PER_STEP), []

    for step in range(STEPS):
        prompts = [data[i] for i in range(step * PROMPTS_PER_STEP + rank, (step + 1) * PROMPTS_PER_STEP, processes)]
        batch = {name: values.to(device) for name, values in rollouts.collate(prompts).items()}
        logits = model(batch["ids"]).logits
        stats = vk.token_stats(logits, batch["ids"], batch["mask"], shift=True, inplace_backward=True)
        segments = vk.Segments.padded(batch["mask"])
        out = vk.vcpo_loss(stats, batch["behavior_logp"], batch["rewards"], rollouts.SAMPLES, segments, ranks=ranks)
        out.loss.backward()
        ess_rate.observe(out)  # the whole step's on every rank
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # at lr * sqrt(ESS / B), restored afterwards
        optimizer.zero_grad()
        history.append(launch.report(step, ess_rate))
    return model, history


if __name__ == "__main__":
    launch.start()
    launch.run(__doc__, train)
