"""A sampler and a learner as two processes, each at its own pace: the lag is what comes of it, not what was set.

The sampler may be ahead of the learner by at most `lag` batches (its bound on staleness). With a bound of 0 the two take
turns, which is the synchronous loop on the same two cores; with more, neither waits while there is work. What is learned
is the same as in `trainer.py`; what is measured here is time.

Parameters go from learner to sampler through shared memory, rollouts back through a queue. Accuracy is taken afterwards,
from copies of the parameters, so that it costs neither of them any time.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import RunConfig
from .passes import TrainingPass
from .stack import ParameterStack, sample_stack
from .tasks import TASKS
from .trainer import Learner, Rollouts, batch_of, draw, held_out_accuracy, verified
from .warm_start import warm_model
from .workers import KEEP_MEMORY, quiet_single_thread

SMOOTHED = 3  # evaluations whose mean must reach the target


@dataclass
class PacedResult:
    """What a run of two processes did, one value a snapshot (every `config.eval_every` steps, the start included).

    steps, seconds, accuracy: learner steps, time since the start, held-out accuracy. staleness: of each learner step's
    rollouts, in learner steps. learner_waited, sampler_waited: fractions of the whole time.
    """

    config: RunConfig
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    learner_waited: float = 0.0
    sampler_waited: float = 0.0

    def seconds_to(self, target: float) -> float | None:
        """Time until the mean of the last three evaluations was `target`; None: never."""
        for i in range(SMOOTHED - 1, len(self.accuracy)):
            if sum(self.accuracy[i - SMOOTHED + 1 : i + 1]) / SMOOTHED >= target:
                return self.seconds[i]
        return None


class _Channel:
    """What the two processes share. A turn is the right to sample one batch."""

    def __init__(self, context: SpawnContext, parameters: int) -> None:
        self.memory = context.RawArray("f", parameters)
        self.version = context.RawValue("q", 0)
        self.lock = context.Lock()
        self.turns = context.Semaphore(0)
        self.rollouts: Any = context.Queue()

    def publish(self, values: Tensor, version: int) -> None:
        """The learner's parameters after so many steps."""
        with self.lock:
            torch.frombuffer(self.memory, dtype=torch.float32).copy_(values)
            self.version.value = version

    def fetch(self, values: Tensor) -> int:
        """Copy the latest parameters into `values`; their version."""
        with self.lock:
            values.copy_(torch.frombuffer(self.memory, dtype=torch.float32))
            return int(self.version.value)


def _sampler(config: RunConfig, folder: Path, channel: _Channel) -> None:
    """The sampler process: a batch for every turn, with the parameters as they are when it begins."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the learner ends this process
    quiet_single_thread()
    stack = ParameterStack(warm_model(config.warm_start, folder), 1)
    channel.rollouts.put(None)  # ready
    began, waited = time.perf_counter(), 0.0
    for batch in range(config.steps):
        asked = time.perf_counter()
        channel.turns.acquire()
        waited += time.perf_counter() - asked
        version = channel.fetch(stack.values[0])
        prompts, uniforms = draw(config, config.seed, batch)
        responses, logp = sample_stack(stack, prompts[None], uniforms[None], config.temperature)
        # As arrays: a tensor would travel through a file descriptor of its own.
        channel.rollouts.put((version, prompts.numpy(), responses.numpy(), logp.numpy()))
    channel.rollouts.put(waited / (time.perf_counter() - began))


def _receive(channel: _Channel, process: SpawnProcess) -> Any:
    while True:
        try:
            return channel.rollouts.get(timeout=1.0)
        except queue.Empty:
            if not process.is_alive():
                raise RuntimeError("the sampler process died (out of memory, or killed).") from None


def run_paced(
    config: RunConfig, folder: Path, progress: Callable[[int, float], None] = lambda step, seconds: None
) -> PacedResult:
    """One run. config.lag is the most that rollouts may be stale. The warm start must be in `folder`.

    progress: called with (step, seconds) after each learner step.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the child reads these two as it starts
    os.environ.setdefault("GLIBC_TUNABLES", KEEP_MEMORY)
    quiet_single_thread()
    model, task = warm_model(config.warm_start, folder), TASKS[config.task]
    stack = ParameterStack(model, 1)
    training = TrainingPass(model.config, config.prompts, config.samples, task.prompt_length, task.answer_length)
    learner = Learner(config, stack, 0, training)
    context = multiprocessing.get_context("spawn")
    channel = _Channel(context, stack.values.numel())
    channel.publish(stack.values[0], 0)
    process = context.Process(target=_sampler, args=(config, folder, channel), daemon=True)
    process.start()
    try:
        _receive(channel, process)
        result, copies = _learn(config, learner, stack, channel, process, progress)
        result.sampler_waited = _receive(channel, process)
    finally:
        process.terminate()
        process.join()
    for values in copies:
        stack.values[0] = values
        result.accuracy.append(held_out_accuracy(stack, config)[0])
    return result


def _learn(
    config: RunConfig,
    learner: Learner,
    stack: ParameterStack,
    channel: _Channel,
    process: SpawnProcess,
    progress: Callable[[int, float], None],
) -> tuple[PacedResult, list[Tensor]]:
    """The learner's loop; its result without accuracies, and the parameters to take them of."""
    result, copies, waited = PacedResult(config, [0], [0.0]), [stack.values[0].clone()], 0.0
    started = time.perf_counter()
    for _ in range(config.lag + 1):
        channel.turns.release()
    for step in range(config.steps):
        asked = time.perf_counter()
        version, *arrays = _receive(channel, process)
        waited += time.perf_counter() - asked
        prompts, responses, logp = map(torch.from_numpy, arrays)
        rewards = verified(TASKS[config.task], prompts[None], responses)
        learner.learn(batch_of(Rollouts(prompts[None], responses, logp, rewards, version), 0))
        channel.publish(stack.values[0], step + 1)
        channel.turns.release()
        result.staleness.append(step - version)
        seconds = time.perf_counter() - started
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            result.steps.append(step + 1)
            result.seconds.append(seconds)
            copies.append(stack.values[0].clone())
        progress(step + 1, seconds)
    result.learner_waited = waited / (time.perf_counter() - started)
    return result, copies
