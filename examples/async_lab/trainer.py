"""The asynchronous trainer: a learner, and a queue of rollouts between it and the sampler.

Lag k is exact and constant: the rollouts of learner step t (counted from 0) were sampled by the parameters
after max(0, t - k) steps. That is a pipeline kept full: before step 0 the sampler fills the queue with k
batches from the initial policy, and from then on each learner step takes the oldest batch out while the
sampler, which has the current parameters, puts a new one in. k = 0 is on-policy training.

    stats = vk.token_stats(logits, responses)
    out = vk.vcpo_loss(stats, rollouts.logp, rewards, samples_per_prompt, segments)
    out.loss.backward()
    ess_rate.observe(out)        # vk.EssLearningRate(optimizer) scales the next step and restores the rate
    after it optimizer.step()
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels.backends import registry

from .config import RunConfig, RunResult
from .methods import METHODS
from .model import Transformer, sample
from .tasks import TASKS
from .warm_start import generator, sampled_accuracy, warm_model

FINAL_EVALS = 5
ROLLOUTS, EVALUATION, HELD_OUT = 11, 12, 13  # random streams of a run


class Stopped(Exception):
    """The caller asked a run to stop before its end."""


@dataclass(frozen=True)
class Rollouts:
    """A batch of samples as the sampler hands them over.

    prompts [B, P], responses [B, T]; logp [B, T] as recorded while sampling; rewards [B]; version: how many
    steps the sampling policy had been trained for.
    """

    prompts: Tensor
    responses: Tensor
    logp: Tensor
    rewards: Tensor
    version: int


class Trainer:
    """One run, a step at a time."""

    def __init__(self, config: RunConfig, model: Transformer) -> None:
        self.config, self.model = config, model
        self.task, self.method = TASKS[config.task], METHODS[config.method]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=0.0, fused=True)
        rule = self.method.step_rule
        self.ess_rate = None if rule is None else vk.EssLearningRate(self.optimizer, rule=rule)
        # The same held-out prompts for every seed, so that seeds differ in training alone.
        self.held_out = self.task.prompts(config.eval_prompts, generator(HELD_OUT))
        self.step = 0
        self.sampled = 0
        self.queue: deque[Rollouts] = deque()
        for _ in range(min(config.lag, config.steps)):
            self._sample()

    def _sample(self) -> None:
        config, task = self.config, self.task
        stream = generator(config.seed, ROLLOUTS, self.sampled)
        prompts = task.prompts(config.prompts, stream).repeat_interleave(config.samples, 0)
        responses, logp = sample(self.model, prompts, task.answer_length, stream, config.temperature)
        rewards = task.rewards(prompts, responses)
        self.queue.append(Rollouts(prompts, responses, logp, rewards, self.step))
        self.sampled += 1

    def train_step(self) -> dict[str, float]:
        """Sample with the current parameters, then learn from the oldest rollouts of the queue."""
        if self.sampled < self.config.steps:
            self._sample()
        return self.learn(self.queue.popleft())

    def learn(self, rollouts: Rollouts) -> dict[str, float]:
        """One optimizer step; its figures, by the names of `RunResult`'s curves."""
        out = self.loss(rollouts)
        self.optimizer.zero_grad()
        out.loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if self.ess_rate is not None:
            self.ess_rate.observe(out)
        self.optimizer.step()
        self.step += 1
        scale = None if self.ess_rate is None else self.ess_rate.scale
        return {
            "reward": float(rollouts.rewards.mean()),
            "ess_ratio": float(out.ess_ratio),
            "grad_norm": float(grad_norm),
            "rate_scale": 1.0 if scale is None else float(scale),
        }

    def loss(self, rollouts: Rollouts) -> vk.VCPOOutput:
        """The method's loss on a batch, under the current parameters."""
        ids = torch.cat([rollouts.prompts, rollouts.responses[:, :-1]], 1)
        logits = self.model(ids, keep=self.task.answer_length)
        stats = vk.token_stats(logits, rollouts.responses, temperature=self.config.temperature)
        segments = vk.Segments.padded(torch.ones_like(rollouts.responses))
        return self.method.loss(stats, rollouts.logp, rollouts.rewards, self.config.samples, segments)

    def evaluate(self) -> float:
        """Held-out accuracy of sampled responses, with the same random stream every time."""
        stream = generator(EVALUATION)
        return sampled_accuracy(self.model, self.task, self.held_out, stream, self.config.temperature)


def row_backend() -> str:
    """Name of the backend that serves `vk.token_stats` here."""
    return registry.select("token_stats", torch.device("cpu"), torch.float32).__name__.split(".")[-2]


def train(
    config: RunConfig,
    folder: Path,
    progress: Callable[[int, float, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> RunResult:
    """A whole run, from the warm start cached in `folder`.

    progress: called with (step, latest accuracy, latest ESS ratio) after each step. stop: asked before each
    step; when true, `Stopped` is raised.
    """
    started = time.perf_counter()
    trainer = Trainer(config, warm_model(config.warm_start, folder))
    result = RunResult(config, eval_steps=[0], accuracy=[trainer.evaluate()])
    for step in range(1, config.steps + 1):
        if stop is not None and stop():
            raise Stopped
        for name, value in trainer.train_step().items():
            getattr(result, name).append(value)
        if step % config.eval_every == 0 or step == config.steps:
            result.eval_steps.append(step)
            result.accuracy.append(trainer.evaluate())
        if progress is not None:
            progress(step, result.accuracy[-1], result.ess_ratio[-1])
    last = result.accuracy[-FINAL_EVALS:]
    result.final_accuracy = sum(last) / len(last)
    result.best_accuracy = max(result.accuracy)
    result.backend = row_backend()
    result.seconds = time.perf_counter() - started
    return result
