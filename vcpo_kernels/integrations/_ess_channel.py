"""From a loss function that never sees the optimizer to the EssLearningRate that scales its steps.

Layer: scalars. A trainer that takes a loss by name calls it in one place and steps its optimizer in another, in the same
process. The rates attached here (`attach`, `attach_to_next_optimizer`) hear of every loss that `publish` announces.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from vcpo_kernels.integrations._given_advantages import WeightedAdvantages
from vcpo_kernels.step_size import EssLearningRate


@dataclass(frozen=True)
class _Announced:
    """A loss whose trainer knows nothing of ESS, as `EssLearningRate.observe` takes it."""

    loss: torch.Tensor
    ess_moments: torch.Tensor


class _Process:
    """What this process has attached, and the losses announced before anything was."""

    def __init__(self) -> None:
        self.rates: list[EssLearningRate] = []
        self.waiting: list[Any] = []  # outputs for a rate that attaches at the optimizer's first step
        self.expecting: RemovableHandle | None = None
        self.warned = False


_PROCESS = _Process()


def attach(
    optimizer: torch.optim.Optimizer, rule: str = "sqrt", reference: float = 1.0, process_group: Any = None
) -> EssLearningRate:
    """An EssLearningRate on `optimizer` that hears of every loss this process computes with the trainer's VCPO loss.

    rule, reference: as `EssLearningRate`. process_group: over whose ranks ESS is taken, every rank of which steps together;
    None: all ranks where torch.distributed is initialised. Ranks that repeat the same sequences (tensor, sequence or context
    parallel) all alike may be in it: ESS / B of a batch repeated k times is that of the batch.

    Detach it with `detach(rate)`.

    >>> import torch
    >>> from vcpo_kernels.integrations import _ess_channel
    >>> rate = _ess_channel.attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), rule="linear")
    >>> _ess_channel.attached() == [rate]
    True
    >>> _ess_channel.detach(rate)
    """
    if process_group is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        process_group = torch.distributed.group.WORLD
    rate = EssLearningRate(optimizer, rule, reference, process_group)
    _PROCESS.rates.append(rate)
    return rate


def attach_to_next_optimizer(rule: str = "sqrt", reference: float = 1.0) -> RemovableHandle:
    """`attach` to the first optimizer that steps in this process, at that step, which is scaled already.

    For trainers that keep their optimizer to themselves. Call it where every rank passes (a module's top level): a rank
    without it would step alone while the others wait for it. The handle's remove() calls it off.

    Raises RuntimeError if one is expected or attached already.
    """
    if _PROCESS.expecting is not None or _PROCESS.rates:
        raise RuntimeError("attach_to_next_optimizer: this process has an EssLearningRate already, or expects one.")

    def first_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        stop_expecting()
        rate = attach(optimizer, rule, reference)
        for output in _PROCESS.waiting:
            rate.observe(output)
        _PROCESS.waiting.clear()
        # torch walks through global hooks first and through the optimizer's own after them, so the new hooks run in this step.

    _PROCESS.expecting = register_optimizer_step_pre_hook(first_step)
    return _PROCESS.expecting


def stop_expecting() -> None:
    """Call `attach_to_next_optimizer` off."""
    if _PROCESS.expecting is not None:
        _PROCESS.expecting.remove()
        _PROCESS.expecting = None


def detach(rate: EssLearningRate) -> None:
    """Take a rate off its optimizer and out of this process."""
    rate.remove()
    _PROCESS.rates = [r for r in _PROCESS.rates if r is not rate]


def attached() -> list[EssLearningRate]:
    """The rates of this process."""
    return list(_PROCESS.rates)


def last_step() -> tuple[torch.Tensor, torch.Tensor] | None:
    """ESS ratio and the factor of the rate at the last step, 0-d each, for logs; None before the first."""
    for rate in _PROCESS.rates:
        if rate.ratio is not None and rate.scale is not None:
            return rate.ratio, rate.scale
    return None


def publish(where: str, result: WeightedAdvantages, loss: torch.Tensor, how: str) -> None:
    """Announce a micro-batch to every attached rate. `how`: how to attach one, for the warning that there is none.

    A loss that takes no gradient (evaluation) is no part of any step.
    """
    if not loss.requires_grad:
        return
    output = _Announced(loss, result.ess_moments)
    for rate in _PROCESS.rates:
        rate.observe(output)
    if _PROCESS.rates:
        return
    if _PROCESS.expecting is not None:
        _PROCESS.waiting.append(output)
    elif not _PROCESS.warned:
        _PROCESS.warned = True
        warnings.warn(f"{where}: no optimizer is attached, so steps are not scaled by ESS. {how}", stacklevel=3)
