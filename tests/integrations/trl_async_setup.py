"""TRL's own AsyncGRPOTrainer on a CPU: what stands in for a server and a GPU.

Stood in for: the vLLM server (a queue filled beforehand; no weights are sent), the GPU kernel of the tree attention (the same
attention written out, under the same name), and the look-up of the GPU's peak rate. Everything between is the real thing.
"""

from __future__ import annotations

import math
import queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from tests.integrations import trl_setup as setup  # before trl.experimental, whose warning it silences

from trl.experimental.async_grpo import async_grpo_trainer  # isort: skip
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample  # isort: skip
from trl.experimental.async_grpo.packing import TREE_ATTENTION  # isort: skip

from vcpo_kernels.integrations.trl import VCPOAsyncTrainer, VCPOAsyncTrainingConfig


def save_model(folder: Path) -> None:
    setup.model(attn_implementation="eager").save_pretrained(folder / "model")


def tree_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Each segment of the tree attends to the keys of its path, causally: softmax(q k / sqrt d) v, in full."""
    q, k, v = query[0], key[0], value[0]  # [heads, N, D]
    repeat = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(repeat, 0)[:, kwargs["tree_kv_index"]] for x in (k, v))
    ends_q, ends_k = (kwargs[f"tree_cu_seqlens_{x}"].tolist() for x in "qk")
    outputs = []
    for i in range(len(ends_q) - 1):
        a, b = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        scores = q[:, a] @ k[:, b].transpose(1, 2) * kwargs["scaling"]
        m, n = scores.shape[1:]
        hidden = torch.arange(n) > torch.arange(m)[:, None] + n - m
        outputs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, b])
    return torch.cat(outputs, 1).transpose(0, 1)[None], None


class FilledQueue:
    """A rollout worker whose samples were all made beforehand."""

    def __init__(self, samples: list[RolloutSample]) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for sample in samples:
            self.rollout_buffer.put(sample)

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("the queue is empty")


class NoTransfer:
    """Weights go nowhere."""

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Any) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


def sequences() -> list[setup.Sequence]:
    """Four prompts of four; in each group, two completions share their first tokens (and so their tree)."""
    rollouts, made = setup.Rollouts(), []
    for prompt in setup.PROMPTS[:4]:
        group = [rollouts.sequence(prompt, number) for number in range(1, setup.GROUP + 1)]
        group[1].completion[:2] = group[0].completion[:2]
        made += group
    return made


def samples(of: list[setup.Sequence]) -> list[RolloutSample]:
    rewards = torch.tensor([s.reward for s in of]).view(-1, setup.GROUP)
    advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-8)).flatten()
    return [
        RolloutSample(
            prompt=[], completion=[], input_ids=np.array(s.prompt + s.completion),
            completion_mask=np.array([0] * len(s.prompt) + [1] * len(s.completion)),
            old_log_probs=np.array([0.0] * len(s.prompt) + s.behavior_logp, dtype=np.float32),
            advantage=float(a), model_version=1, group_id=i // setup.GROUP, metrics={"reward": s.reward},
        )
        for i, (s, a) in enumerate(zip(of, advantages, strict=True))
    ]  # fmt: skip


def train(folder: Path, of: list[setup.Sequence], processes: int = 1, **changes: Any) -> Any:
    args = setup.arguments(
        folder / "out", VCPOAsyncTrainingConfig,
        **{
            "max_steps": 1, "per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2,
            "token_budget": -1, **changes,
        },
    )  # fmt: skip
    # Accelerate fetches a batch ahead: the eight at the end are never trained on.
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    trainer = VCPOAsyncTrainer(
        str(folder / "model"), setup.reward, args, setup.dataset(), processing_class=setup.tokenizer(),
        rollout_worker=FilledQueue(samples(of + of[:8])), weight_transfer=NoTransfer(),
    )  # fmt: skip
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
    trainer.recorder = setup.GradientRecorder()
    trainer.add_callback(trainer.recorder)
    trainer.train()
    return trainer
