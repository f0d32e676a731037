"""VCPO in a Hugging Face Trainer: two methods.

    python -m examples.loops.hugging_face_trainer
    torchrun --nproc-per-node 2 -m examples.loops.hugging_face_trainer    # half the micro-batches a process

docs/huggingface.md explains it. For GRPOTrainer scripts there is vcpo_kernels.integrations.trl.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import transformers

import vcpo_kernels as vk
from examples.loops import launch, rollouts

STEPS, PROMPTS_PER_STEP, MICRO_BATCH = 4, 8, 2  # prompts; each has rollouts.SAMPLES responses


class RolloutTrainer(transformers.Trainer):
    """A Trainer on batches of `rollouts.collate`, whose steps are scaled by the ESS of all their micro-batches."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if not hasattr(self, "ess_rate"):
            # Before accelerate wraps the optimizer. ESS is taken over all processes, which step together.
            group = dist.group.WORLD if dist.is_initialized() else None
            self.ess_rate = vk.EssLearningRate(optimizer, process_group=group)
        return optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # The Trainer divides by the number of micro-batches and DDP by that of the processes: 1/B of one micro-batch is left.
        config = vk.VCPOConfig(num_sequences=len(inputs["ids"]))
        output = model(inputs["ids"])
        stats = vk.token_stats(output.logits, inputs["ids"], inputs["mask"], shift=True)
        segments = vk.Segments.padded(inputs["mask"])
        out = vk.vcpo_loss(stats, inputs["behavior_logp"], inputs["rewards"], rollouts.SAMPLES, segments, config)
        if model.training:
            self.ess_rate.observe(out)
        return (out.loss, output) if return_outputs else out.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        rate = getattr(self, "ess_rate", None)
        if rate is not None and rate.scale is not None and "learning_rate" in logs:
            logs["vcpo/ess_ratio"] = float(rate.ratio)
            logs["vcpo/learning_rate_used"] = logs["learning_rate"] * float(rate.scale)
        super().log(logs, start_time)


def make_trainer(folder: str, processes: int = 1, **arguments: Any) -> RolloutTrainer:
    """PROMPTS_PER_STEP are divided among `processes`."""
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": launch.share(PROMPTS_PER_STEP // MICRO_BATCH, processes),
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "dataloader_drop_last": True,  # the last micro-batch is as large as the others
        "remove_unused_columns": False,
        "use_cpu": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return RolloutTrainer(
        model=rollouts.tiny_model(),
        args=transformers.TrainingArguments(**options | arguments),
        train_dataset=rollouts.StalePrompts(STEPS * PROMPTS_PER_STEP),
        data_collator=rollouts.collate,
    )


def train(processes: int = 1) -> tuple[torch.nn.Module, list[float]]:
    """The trained model, and each step's ESS / B."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, processes)
        trainer.train()
    history = [log["vcpo/ess_ratio"] for log in trainer.state.log_history if "vcpo/ess_ratio" in log]
    return trainer.accelerator.unwrap_model(trainer.model), history


def main() -> None:
    launch.run(__doc__, lambda: train(launch.processes()))


if __name__ == "__main__":
    main()
