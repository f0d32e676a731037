"""verl's own FSDP2 engine, stepped by its TrainingWorker with the plugin's loss and optimizer, against a plain loop of torch.

`make test-verl` runs it, in verl's own environment.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.loops import rollouts
from tests import ranks

pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed: make test-verl")

STEPS, PROMPTS, RATE, CAP = 3, 2, 1e-3, 8.0
EPSILON = 1e-6  # Adam's: with less, what gradients of nearly 0 are rounded to shows
SEQUENCES, P, RESPONSE = PROMPTS * rollouts.SAMPLES, rollouts.PROMPT, rollouts.LENGTH - rollouts.PROMPT


def batches() -> list[dict[str, Tensor]]:
    """A step's sequences each, log mu and advantages in the response's columns."""
    data = rollouts.StalePrompts(STEPS * PROMPTS, staleness=0.2)
    made = []
    for step in range(STEPS):
        batch = rollouts.collate([data[i] for i in range(step * PROMPTS, (step + 1) * PROMPTS)])
        mask = batch["mask"][:, P:].long()
        rewards = batch["rewards"].view(PROMPTS, -1)
        advantages = (rewards - rewards.mean(-1, keepdim=True)).view(-1, 1) * mask
        mu = torch.where(mask.bool(), batch["behavior_logp"][:, P:], 0.0)
        made.append({"ids": batch["ids"], "mask": mask, "mu": mu, "advantages": advantages})
    return made


def plain_loop() -> tuple[dict[str, Tensor], list[float]]:
    """VCPO with sequence means, the rate by hand; nothing of the package. Parameters, and ESS / B of each step."""
    model = rollouts.tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, eps=EPSILON)
    ratios = []
    for batch in batches():
        logits = model(batch["ids"]).logits[:, P - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, batch["ids"][:, P:, None])[..., 0]
        weights = ((logp.detach() - batch["mu"]) * batch["mask"]).sum(-1).exp()
        per_sequence = (logp * batch["advantages"]).sum(-1) / batch["mask"].sum(-1)
        (-weights.clamp(max=CAP) * per_sequence).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ratios.append((weights.sum().square() / weights.square().sum() / SEQUENCES).item())
        optimizer.param_groups[0]["lr"] = RATE * ratios[-1] ** 0.5
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, ratios


def on_rank(rank: int, folder: str, micro_batch: int) -> dict[str, Any]:
    """The same steps by verl: this rank's parameters (whole), ESS / B of each step, and what verl logged."""
    import os

    os.environ["VERL_PLATFORM"] = "cpu"
    from examples.verl_cpu import cpu_platform

    cpu_platform.register()
    from verl.utils import tensordict_utils as tu

    from vcpo_kernels.integrations import _ess_channel

    worker = training_worker(folder, micro_batch)
    (rate,) = _ess_channel.attached()
    ratios, logged = [], []
    for batch in batches():
        result = worker.train_mini_batch(as_verl_wants(batch, worker.engine))
        ratios.append((float(rate.ratio), float(rate.scale)))
        logged.append({name: float(values[0]) for name, values in tu.get(result, "metrics").items() if "vcpo" in name})
    parameters = dict(worker.engine.module.named_parameters())
    return {
        "kinds": {type(p).__name__ for p in parameters.values()},
        "parameters": {name: p.full_tensor().detach().clone() for name, p in parameters.items()},
        "steps": ratios,
        "logged": logged,
    }


def training_worker(folder: str, micro_batch: int) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        PolicyLossConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    fp32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=folder,
                load_tokenizer=False,
                use_remove_padding=False,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                model_dtype="fp32",
                mixed_precision=fp32,
                use_torch_compile=False,
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=micro_batch,
            ),
            optimizer_config=FSDPOptimizerConfig(
                lr=RATE,
                weight_decay=0.0,
                betas=(0.9, 0.999),
                optimizer_impl="vcpo_kernels.integrations.verl",
                optimizer="EssAdamW",
                lr_scheduler_type="constant",
                total_training_steps=STEPS,
                override_optimizer_config={"eps": EPSILON},
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=rollouts.SAMPLES,
        ppo_mini_batch_size=SEQUENCES,
        ppo_micro_batch_size_per_gpu=micro_batch,
        loss_agg_mode="seq-mean-token-mean",
        policy_loss=PolicyLossConfig(loss_mode="vcpo"),
        use_torch_compile=False,
    )
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))
    return worker


def as_verl_wants(batch: dict[str, Tensor], engine: Any) -> Any:
    """This rank's sequences, as verl's trainer hands an actor its mini-batch."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    count = SEQUENCES // engine.get_data_parallel_size()
    mine = slice(engine.get_data_parallel_rank() * count, (engine.get_data_parallel_rank() + 1) * count)
    whole = {
        "prompts": batch["ids"][:, :P],
        "responses": batch["ids"][:, P:],
        "response_mask": batch["mask"],
        "input_ids": batch["ids"],
        "attention_mask": torch.nn.functional.pad(batch["mask"], (P, 0), value=1),
        "position_ids": torch.arange(P + RESPONSE).repeat(SEQUENCES, 1),
        "old_log_probs": batch["mu"],
        "advantages": batch["advantages"],
    }
    data = left_right_2_no_padding(TensorDict({k: v[mine] for k, v in whole.items()}, batch_size=count))
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        global_batch_size=SEQUENCES,
        mini_batch_size=SEQUENCES,
        epochs=1,
        calculate_entropy=False,
        compute_loss=True,
        dataloader_kwargs={"shuffle": False},
    )
    return data


@pytest.mark.parametrize(("world", "micro_batch"), [(1, SEQUENCES), (2, 2)])
def test_steps_are_the_plain_loops(tmp_path: Path, world: int, micro_batch: int) -> None:
    """Parameters after three steps on one rank and on two with micro-batches, ESS of each step, and what verl logs of it."""
    rollouts.tiny_model().save_pretrained(tmp_path)
    want, ratios = plain_loop()
    assert max(ratios) < 0.9  # else the rate's factor would not be seen
    start = dict(rollouts.tiny_model().named_parameters())
    for result in ranks.run(on_rank, world, str(tmp_path), micro_batch):
        assert result["kinds"] == {"DTensor"}
        assert result["parameters"].keys() == want.keys()
        difference = {name: (result["parameters"][name] - p).abs().max().item() for name, p in want.items()}
        assert max(difference.values()) < 1e-5, difference
        assert min((p - start[name]).abs().max().item() for name, p in want.items()) > 5e-4
        assert [ratio for ratio, _ in result["steps"]] == pytest.approx(ratios, abs=1e-5)
        assert [scale for _, scale in result["steps"]] == pytest.approx([ratio**0.5 for ratio in ratios], abs=1e-5)
        for (ratio, scale), logged in zip(result["steps"], result["logged"][1:], strict=False):
            assert logged["actor/vcpo_last_step_ess_ratio"] == pytest.approx(ratio)
            assert logged["actor/vcpo_last_step_lr_scale"] == pytest.approx(scale)
