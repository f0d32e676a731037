"""The step of a Trainer scaled by ESS: `EssLearningRate` on the optimizer that the Trainer made, as a callback."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

import vcpo_kernels as vk
from vcpo_kernels.integrations.trl.config import NO_RULE
from vcpo_kernels.parallel.ranks import world


class EssStep(TrainerCallback):
    """Hooks the inner optimizer when training begins, and logs `vcpo/rate_scale` after each step.

    It has no state between steps, so that a resumed run continues as if it had not stopped: a checkpoint holds the
    optimizer's and the scheduler's unscaled rates.

    across_ranks: what is observed is of this rank alone, and is merged with the others' before the step.

    Attributes: scale, the factor of the last step, 1.0 before the first.
    """

    def __init__(self, trainer: Any, rule: str, reference: float, across_ranks: bool = False) -> None:
        self._trainer, self._rule, self._reference, self._across_ranks = trainer, rule, reference, across_ranks
        self._rate: vk.EssLearningRate | None = None
        self.scale = 1.0

    def observe(self, ess: vk.EffectiveSampleSize) -> None:
        """Count a window, or a micro-batch of one, in the next step."""
        if self._rate is not None:
            self._rate.observe(ess)

    def reset(self) -> None:
        """Forget what was observed for a step that did not happen."""
        if self._rate is not None:
            self._rate.reset()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()
        if self._rule == NO_RULE:
            return
        optimizer = self._trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper has no step hooks
            optimizer = optimizer.optimizer
        self._rate = vk.EssLearningRate(optimizer, self._rule, self._reference, world() if self._across_ranks else None)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._rate is None or self._rate.scale is None:
            return
        self.scale = float(self._rate.scale)
        metrics = self._trainer._metrics["train"]
        metrics["vcpo/rate_scale"].append(self.scale)
        if self._across_ranks:
            metrics["vcpo/ess_ratio"].append(float(self._rate.ratio) if self._rate.ratio is not None else math.nan)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._rate is not None:
            self._rate.remove()
        self._rate, self.scale = None, 1.0
