"""What the lab's tests share: small configurations and trainers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from examples.async_lab.config import RunConfig, WarmStartConfig
from examples.async_lab.model import Transformer
from examples.async_lab.tasks import TASKS
from examples.async_lab.trainer import Batch, Trainer
from examples.async_lab.warm_start import model_for

UNTRAINED = WarmStartConfig(target=0.01)  # reached by guessing, so no supervised step is taken


def tiny(**changes: object) -> RunConfig:
    """Two prompts, four samples, two steps."""
    config = RunConfig(lag=1, steps=2, prompts=2, samples=4, eval_every=1, eval_prompts=8, warm_start=UNTRAINED)
    return replace(config, **changes)  # type: ignore[arg-type]


def trainer(*methods: str, **changes: object) -> Trainer:
    """A trainer of one run per method, from an untrained model."""
    torch.manual_seed(0)
    configs = [tiny(method=method, **changes) for method in methods or ("vcpo",)]
    return Trainer(configs, model_for(TASKS[configs[0].task]))


def token_logp(model: Transformer, prompts: Tensor, responses: Tensor) -> Tensor:
    """log pi of each response token [B, T] from one pass without a cache, in plain torch, in float64."""
    each = prompts.repeat_interleave(len(responses) // len(prompts), 0)
    logits = model(torch.cat([each, responses], 1)).double()[:, prompts.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)


def batch_logp(model: Transformer, batch: Batch) -> Tensor:
    """The same of a batch."""
    return token_logp(model, batch.prompts, batch.responses)
