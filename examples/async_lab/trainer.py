"""The asynchronous trainer: a learner, and a queue of rollouts between it and the sampler.

Lag k is exact and constant: the rollouts of learner step t (counted from 0) were sampled by the parameters
after max(0, t - k) steps. That is a pipeline kept full: before step 0 the sampler fills the queue with k
batches from the initial policy, and from then on each learner step takes the oldest batch out while the
sampler, which has the current parameters, puts a new one in. k = 0 is on-policy training.

    stats = vk.token_stats(logits, responses)
    out = objectives.sequence_truncated_is(stats, rollouts.logp, advantages, segments)
    out.loss.backward()
    ess_rate.observe(out)        # vk.EssLearningRate(optimizer) scales the next step and restores the rate
    optimizer.step()

A `Trainer` takes several runs at once, of one shape and lag, that differ in method, rate or seed. They share nothing but
the calls: sampling is one batched pass over all models (`stack.py`), learning goes run by run (`passes.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels.core import registry

from .config import RunConfig, RunResult
from .methods import METHODS, Method, Output
from .model import Transformer
from .passes import TrainingPass
from .stack import ParameterStack, sample_stack
from .tasks import TASKS, Task
from .warm_start import generator, warm_model

FILL = 16  # batches of the initial policy that are sampled in one call
ROLLOUTS, EVALUATION, HELD_OUT = 11, 12, 13  # random streams of a run


class Stopped(Exception):
    """The caller asked a run to stop before its end."""


@dataclass(frozen=True)
class Rollouts:
    """A batch of samples of R runs as the sampler hands them over: G prompts, S samples of each, T tokens.

    prompts [R, G, P], responses [R, G, S, T]; logp [R, G, S, T] as recorded while sampling; rewards [R, G, S];
    version: how many steps the sampling policy had been trained for.
    """

    prompts: Tensor
    responses: Tensor
    logp: Tensor
    rewards: Tensor
    version: int


@dataclass(frozen=True)
class Batch:
    """One run's part of the rollouts, as a loss wants it: prompts [G, P]; the rest by sequence, B = G * S."""

    prompts: Tensor
    responses: Tensor
    logp: Tensor
    rewards: Tensor


class Learner:
    """One run's optimizer and method, on its row of the parameter stack."""

    def __init__(self, config: RunConfig, stack: ParameterStack, run: int, training: TrainingPass) -> None:
        self.config, self.method, self.training = config, METHODS[config.method], training
        self.values, self.gradients = stack.by_run[run], stack.gradients_by_run[run]
        self.flat = stack.optimizer_parameters[run]
        self.optimizer = torch.optim.AdamW([self.flat], lr=config.rate, weight_decay=0.0, fused=True)
        rule = self.method.step_rule
        self.ess_rate = None if rule is None else vk.EssLearningRate(self.optimizer, rule=rule)
        self.module = stack.module(run) if self.method.exact_norms else None

    def learn(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; its figures, by the names of `RunResult`'s curves."""
        out = self.gradient(batch)
        grad_norm = torch.nn.utils.clip_grad_norm_([self.flat], self.config.clip)
        if self.ess_rate is not None:
            self.ess_rate.observe(out)
        self.optimizer.step()
        scale = None if self.ess_rate is None else self.ess_rate.scale
        return {
            "reward": float(batch.rewards.mean()),
            "ess_ratio": float(out.ess_ratio),
            "grad_norm": float(grad_norm),
            "rate_scale": 1.0 if scale is None else float(scale),
        }

    def gradient(self, batch: Batch) -> Output:
        """Leave the gradient of the method's loss in the stack."""
        if self.module is not None:
            return exact_norm_gradient(self.module, self.method, self.config, batch)
        samples = batch.responses.view(len(batch.prompts), -1, batch.responses.shape[-1])
        logits = self.training.forward(self.values, batch.prompts, samples)
        out = loss_of(logits, batch, self.method, self.config)
        out.loss.backward()
        assert logits.grad is not None
        self.training.backward(logits.grad, self.gradients)
        return out


def loss_of(logits: Tensor, batch: Batch, method: Method, config: RunConfig) -> Output:
    """The method's loss from the logits of the response tokens, [B, T, V]."""
    stats = vk.token_stats(logits, batch.responses, temperature=config.temperature)
    segments = vk.Segments.padded(torch.ones_like(batch.responses))
    return method.loss(stats, batch.logp, batch.rewards, config.samples, segments)


def exact_norm_gradient(module: Transformer, method: Method, config: RunConfig, batch: Batch) -> Output:
    """The same with each sequence's exact gradient norm in the baseline, by one forward and one backward.

    A prompt's rows must then be its sequence's own, so nothing is shared between samples here.
    """
    prompts = batch.prompts.repeat_interleave(config.samples, 0)
    ids = torch.cat([prompts, batch.responses[:, :-1]], 1)
    segments = vk.Segments.padded(torch.ones_like(batch.responses))
    for parameter in module.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    with vk.SequenceGradients(module) as gradients:
        logits = module(ids)[:, prompts.shape[1] - 1 :]
        stats = vk.token_stats(logits, batch.responses, temperature=config.temperature)
        gradients.backward(segments.sum(stats.logp), vk.Segments.padded(torch.ones_like(ids)))
        norms = gradients.squared_norms()
        out = method.loss(stats, batch.logp, batch.rewards, config.samples, segments, norms)
        gradients.accumulate_(out.coefficients)
    # Observed without the loss: its backward has been done by hand.
    return replace(out, loss=out.loss.detach())


class Trainer:
    """Some runs of one shape, a step at a time. They must agree in all but method, rate, seed and clip."""

    def __init__(self, configs: Sequence[RunConfig], model: Transformer) -> None:
        self.configs, self.config = list(configs), configs[0]
        if len({c.shape for c in configs}) > 1:
            raise ValueError("the runs of one trainer must agree in all but method, rate, seed and clip.")
        self.task: Task = TASKS[self.config.task]
        self.stack = ParameterStack(model, len(configs))
        prompts, samples = self.config.prompts, self.config.samples
        self.training = TrainingPass(model.config, prompts, samples, self.task.prompt_length, self.task.answer_length)
        self.learners = [Learner(c, self.stack, run, self.training) for run, c in enumerate(configs)]
        self.step = 0
        self.sampled = 0
        self.queue: deque[Rollouts] = deque()
        self._fill(model, min(self.config.lag, self.config.steps))

    def _fill(self, model: Transformer, batches: int) -> None:
        """The queue's first batches, all of the initial policy: those of one seed are the same in every run."""
        seeds = list(dict.fromkeys(c.seed for c in self.configs))
        row_of = torch.tensor([seeds.index(c.seed) for c in self.configs])
        initial = ParameterStack(model, len(seeds))
        for start in range(0, batches, FILL):
            count = min(FILL, batches - start)
            drawn = [[draw(self.config, seed, start + i) for i in range(count)] for seed in seeds]
            prompts = torch.stack([torch.cat([p for p, _ in row]) for row in drawn])
            uniforms = torch.stack([torch.cat([u for _, u in row]) for row in drawn])
            responses, logp = sample_stack(initial, prompts, uniforms, self.config.temperature)
            for i in range(count):
                part = slice(i * self.config.prompts, (i + 1) * self.config.prompts)
                self._put(prompts[row_of, part], responses[row_of, part], logp[row_of, part])

    def _put(self, prompts: Tensor, responses: Tensor, logp: Tensor) -> None:
        rewards = verified(self.task, prompts, responses)
        self.queue.append(Rollouts(prompts, responses, logp, rewards, self.step))
        self.sampled += 1

    def _sample(self) -> None:
        drawn = {seed: draw(self.config, seed, self.sampled) for seed in {c.seed for c in self.configs}}
        prompts = torch.stack([drawn[c.seed][0] for c in self.configs])
        uniforms = torch.stack([drawn[c.seed][1] for c in self.configs])
        self._put(prompts, *sample_stack(self.stack, prompts, uniforms, self.config.temperature))

    def train_step(self) -> list[dict[str, float]]:
        """Sample with the current parameters, then learn from the oldest rollouts; each run's figures."""
        if self.sampled < self.config.steps:
            self._sample()
        return self.learn(self.queue.popleft())

    def learn(self, rollouts: Rollouts) -> list[dict[str, float]]:
        """One optimizer step of every run."""
        figures = [learner.learn(batch_of(rollouts, run)) for run, learner in enumerate(self.learners)]
        self.step += 1
        return figures

    def evaluate(self) -> list[float]:
        """Held-out accuracy of every run."""
        return held_out_accuracy(self.stack, self.config)


def draw(config: RunConfig, seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Prompts [G, P] of a seed's batch, and the random numbers [G, S, T] that their responses are drawn with."""
    task, stream = TASKS[config.task], generator(seed, ROLLOUTS, batch)
    prompts = task.prompts(config.prompts, stream)
    return prompts, torch.rand(config.prompts, config.samples, task.answer_length, generator=stream)


def verified(task: Task, prompts: Tensor, responses: Tensor) -> Tensor:
    """Rewards [R, G, S] of responses [R, G, S, T] to prompts [R, G, P]."""
    each = prompts.unsqueeze(2).expand(*responses.shape[:3], -1)
    return task.rewards(each.flatten(0, 2), responses.flatten(0, 2)).view(responses.shape[:3])


def held_out_accuracy(stack: ParameterStack, config: RunConfig) -> list[float]:
    """Accuracy of sampled responses of each model, with the same prompts and random numbers every time and in every
    run, so that seeds differ in training alone."""
    task, runs = TASKS[config.task], len(stack)
    prompts = task.prompts(config.eval_prompts, generator(HELD_OUT))
    uniforms = torch.rand(len(prompts), 1, task.answer_length, generator=generator(EVALUATION))
    every = prompts.expand(runs, -1, -1), uniforms.expand(runs, -1, -1, -1)
    responses, _ = sample_stack(stack, *every, config.temperature)
    correct = task.correct(prompts.repeat(runs, 1), responses.flatten(0, 2))
    accuracies: list[float] = correct.view(runs, -1).mean(1).tolist()
    return accuracies


def batch_of(rollouts: Rollouts, run: int) -> Batch:
    """One run's part, by sequence."""
    responses, logp = (t[run].flatten(0, 1) for t in (rollouts.responses, rollouts.logp))
    return Batch(rollouts.prompts[run], responses, logp, rollouts.rewards[run].flatten())


def row_backend() -> str:
    """Name of the backend that serves `vk.token_stats` here."""
    return registry.select("token_stats", torch.device("cpu"), torch.float32).__name__.split(".")[-2]


def train(
    configs: Sequence[RunConfig],
    folder: Path,
    progress: Callable[[int, list[float], list[float]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[RunResult]:
    """Whole runs, from the warm start cached in `folder`.

    progress: called with (step, latest accuracies, latest ESS ratios) after each step. stop: asked before each
    step; when true, `Stopped` is raised.
    """
    started = time.perf_counter()
    config = configs[0]
    trainer = Trainer(configs, warm_model(config.warm_start, folder))
    results = [RunResult(c) for c in configs]
    for result, accuracy in zip(results, trainer.evaluate(), strict=True):
        result.add(0, accuracy)
    since: list[list[dict[str, float]]] = []
    for step in range(1, config.steps + 1):
        if stop is not None and stop():
            raise Stopped
        latest = trainer.train_step()
        since.append(latest)
        if step % config.eval_every == 0 or step == config.steps:
            by_run = zip(results, trainer.evaluate(), zip(*since, strict=True), strict=True)
            for result, accuracy, figures in by_run:
                result.add(step, accuracy, figures)
            since.clear()
        if progress is not None:
            progress(step, [r.accuracy[-1] for r in results], [f["ess_ratio"] for f in latest])
    seconds = (time.perf_counter() - started) / len(configs)
    return [result.finish(row_backend(), seconds) for result in results]
