"""VCPO in a plain PyTorch loop with context parallelism: the ranks have the same sequences, each a piece of their tokens.

    python -m examples.loops.context_parallel
    torchrun --nproc-per-node 2 -m examples.loops.context_parallel    # same ESS, same weights

Labels are shifted before they are split, since a piece's first token is predicted by the piece before. Sums over a sequence
cross the ranks by the segments' `sequence_group`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import vcpo_kernels as vk
from examples.loops import launch, rollouts
from examples.loops.small_model import small_model

STEPS, PROMPTS_PER_STEP = 4, 8  # prompts; each has rollouts.SAMPLES responses


def piece(batch: rollouts.Batch, processes: int, rank: int) -> rollouts.Batch:
    """This rank's tokens, with what is known of the token that each of them predicts."""
    shifted = {name: batch[name].roll(-1, 1) for name in ("mask", "behavior_logp")}
    shifted["labels"] = batch["ids"].roll(-1, 1)
    shifted["mask"][:, -1] = False  # the last token predicts none
    of_tokens = {"ids": batch["ids"], **shifted}
    return batch | {name: values.chunk(processes, 1)[rank].contiguous() for name, values in of_tokens.items()}


def train() -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """The trained model, and ESS / B and the rate's scale of each step."""
    device, processes, rank = launch.place()
    ranks = vk.Ranks()
    if processes > 1:
        ranks = vk.Ranks.of(init_device_mesh(device.type, (processes,), mesh_dim_names=("cp",)))
    model = small_model(ranks.sequence).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ess_rate = vk.EssLearningRate(optimizer)
    data, history = rollouts.StalePrompts(STEPS * PROMPTS_PER_STEP, of=small_model), []

    for step in range(STEPS):
        prompts = [data[i] for i in range(step * PROMPTS_PER_STEP, (step + 1) * PROMPTS_PER_STEP)]  # on every rank
        batch = {name: v.to(device) for name, v in piece(rollouts.collate(prompts), processes, rank).items()}
        logits = model(batch["ids"]).logits
        stats = vk.token_stats(logits, batch["labels"], batch["mask"], inplace_backward=True)
        segments = vk.Segments.padded(batch["mask"], sequence_group=ranks.sequence)
        out = vk.vcpo_loss(stats, batch["behavior_logp"], batch["rewards"], rollouts.SAMPLES, segments, ranks=ranks)
        out.loss.backward()
        if processes > 1:  # each has its tokens' share; under FSDP2 or DDP their average, with Ranks(averaged=True)
            for p in model.parameters():
                dist.all_reduce(p.grad, group=ranks.sequence)
        ess_rate.observe(out)
        optimizer.step()  # at lr * sqrt(ESS / B), restored afterwards
        optimizer.zero_grad()
        history.append(launch.report(step, ess_rate))
    return model, history


if __name__ == "__main__":
    launch.start()
    launch.run(__doc__, train)
