"""The supervised model that every run starts from: trained once, then read from disk."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import WarmStartConfig, write_atomically
from .model import ModelConfig, Transformer, sample
from .tasks import TASKS, Task

EVAL_EVERY = 5
EVAL_PROMPTS = 512


def generator(*keys: int) -> torch.Generator:
    """A random stream of its own for each tuple of keys."""
    state = 0
    for key in keys:
        state = (state * 1_000_003 + key + 1) % 2**63
    return torch.Generator().manual_seed(state)


def model_for(task: Task) -> Transformer:
    """An untrained model of the task's size."""
    return Transformer(ModelConfig(task.vocabulary, task.prompt_length + task.answer_length))


def sampled_accuracy(
    model: Transformer, task: Task, prompts: Tensor, generator: torch.Generator, temperature: float = 1.0
) -> float:
    """Fraction of right tokens over one sampled response to each prompt."""
    responses, _ = sample(model, prompts, task.answer_length, generator, temperature)
    return float(task.correct(prompts, responses).mean())


def train(config: WarmStartConfig) -> tuple[Transformer, float]:
    """Next-token cross entropy on right answers until the target accuracy; the model and what it reached."""
    task = TASKS[config.task]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = model_for(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=0.0)
    examples = generator(config.seed, 1)
    held_out = task.prompts(EVAL_PROMPTS, generator(config.seed, 2))
    accuracy = 0.0
    for step in range(config.max_steps + 1):
        if step % EVAL_EVERY == 0:
            accuracy = sampled_accuracy(model, task, held_out, generator(config.seed, 3))
            if accuracy >= config.target:
                return model, accuracy
        prompts = task.prompts(config.batch, examples)
        answers = task.answers(prompts)
        logits = model(torch.cat([prompts, answers[:, :-1]], 1), keep=task.answer_length)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(
        f"the warm start must reach sampled accuracy {config.target} within {config.max_steps} steps; "
        f"it got {accuracy:.3f}. Lower target or raise max_steps."
    )


def warm_model(config: WarmStartConfig, folder: Path) -> Transformer:
    """The warm-started model, from `folder` where it has been trained before."""
    path = folder / config.filename
    if not path.exists():
        content = io.BytesIO()
        torch.save(train(config)[0].state_dict(), content)
        write_atomically(path, content.getvalue())
    model = model_for(TASKS[config.task])
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
