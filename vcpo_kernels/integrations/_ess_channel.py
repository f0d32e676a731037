"""From a loss function that never sees the optimizer to the EssLearningRate that scales its steps.

Layer: scalars. A trainer that takes a loss by name calls it in one place and steps its optimizer in another, in the same
process. The rates attached here (`attach`, `attach_to_next_optimizer`) hear of every loss that `publish` announces.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vcpo_kernels.integrations._given_advantages import WeightedAdvantages
from vcpo_kernels.parallel.ranks import world
from vcpo_kernels.step_size import EssLearningRate


@dataclass(eq=False)
class _Announced:
    """A loss whose trainer knows nothing of ESS, as `EssLearningRate.observe` takes it."""

    loss: torch.Tensor
    ess_moments: torch.Tensor
    backpropagated: bool = False


class Expectation:
    """The first optimizer that steps, waited for. Losses wait with it, unless their gradients are cleared before."""

    def __init__(self, rule: str, reference: float) -> None:
        self._rule, self._reference = rule, reference
        self._waiting: list[_Announced] = []
        self._over = False
        self._handle = register_optimizer_step_pre_hook(self._first_step)
        self._leave_zero_grad = self._watch_zero_grad()

    def add(self, output: _Announced) -> None:
        """Keep a micro-batch for the step."""

        def mark(grad: torch.Tensor) -> None:
            output.backpropagated = True

        output.loss.register_hook(mark)
        self._waiting.append(output)

    def remove(self) -> None:
        """Call it off, or clear up behind it."""
        self._over = True
        self._waiting.clear()
        self._handle.remove()
        self._leave_zero_grad()
        if _PROCESS.expecting is self:
            _PROCESS.expecting = None

    def _first_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._over:
            return
        # torch is walking through its global hooks: this one must stay for now. The optimizer's own come after them, so that
        # the rate's run in this step.
        self._over, _PROCESS.expecting, _PROCESS.spent = True, None, self
        self._leave_zero_grad()
        rate = attach(optimizer, self._rule, self._reference)
        for output in self._waiting:
            rate.observe(output)
        self._waiting.clear()

    def _watch_zero_grad(self) -> Callable[[], None]:
        """Until it is undone any optimizer's zero_grad() is heard: which one will step is not known yet."""
        original = torch.optim.Optimizer.zero_grad

        @functools.wraps(original)
        def zero_grad(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            self._waiting = [output for output in self._waiting if not output.backpropagated]
            original(optimizer, *args, **kwargs)

        def undo() -> None:
            if torch.optim.Optimizer.zero_grad is zero_grad:
                torch.optim.Optimizer.zero_grad = original  # type: ignore[method-assign]

        torch.optim.Optimizer.zero_grad = zero_grad  # type: ignore[method-assign,assignment]
        return undo


class _Process:
    """What this process has attached, and what it waits for."""

    def __init__(self) -> None:
        self.rates: list[EssLearningRate] = []
        self.expecting: Expectation | None = None
        self.spent: Expectation | None = None  # its hook is still to be removed
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
    rate = EssLearningRate(optimizer, rule, reference, world() if process_group is None else process_group)
    _PROCESS.rates.append(rate)
    return rate


def attach_to_next_optimizer(rule: str = "sqrt", reference: float = 1.0) -> Expectation:
    """`attach` to the first optimizer that steps in this process, at that step, which is scaled already.

    For trainers that keep their optimizer to themselves. Call it where every rank passes (a module's top level): a rank
    without it would step alone while the others wait for it. Until then losses whose gradients any optimizer's zero_grad()
    clears are forgotten. The result's remove() calls it off.

    Raises RuntimeError if one is expected or attached already.
    """
    if _PROCESS.expecting is not None or _PROCESS.rates:
        raise RuntimeError("attach_to_next_optimizer: this process has an EssLearningRate already, or expects one.")
    _PROCESS.expecting = Expectation(rule, reference)
    return _PROCESS.expecting


def stop_expecting() -> None:
    """Call `attach_to_next_optimizer` off."""
    for expectation in (_PROCESS.expecting, _PROCESS.spent):
        if expectation is not None:
            expectation.remove()
    _PROCESS.spent = None


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
    if _PROCESS.spent is not None:
        stop_expecting()
    output = _Announced(loss, result.ess_moments)
    for rate in _PROCESS.rates:
        rate.observe(output)
    if _PROCESS.rates:
        return
    if _PROCESS.expecting is not None:
        _PROCESS.expecting.add(output)
    elif not _PROCESS.warned:
        _PROCESS.warned = True
        warnings.warn(f"{where}: no optimizer is attached, so steps are not scaled by ESS. {how}", stacklevel=3)
