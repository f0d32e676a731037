"""EssLearningRate: scale each optimizer step by the effective sample size of the batch behind it.

Layer: scalars. eta_eff = eta * min(1, rho / rho_ref)^exponent, rho = ESS / B of everything observed since the last step.
"""

from __future__ import annotations

import numbers
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.sequences.ess import EffectiveSampleSize, ess_from_moments, ess_moments, merge_moments

RULES: dict[str, float] = {"sqrt": 0.5, "linear": 1.0}  # exponent of min(1, rho / rho_ref)


@runtime_checkable
class Observable(Protocol):
    """What a batch's result needs for its step to be scaled: a loss to watch, and `ess_moments` of its log-weights.

    `vcpo_loss`'s output and every objective's have both.
    """

    @property
    def loss(self) -> Tensor:
        """0-d. Gradients of it that are thrown away take the observation with them."""

    @property
    def ess_moments(self) -> Tensor:
        """float64 [3]."""


@dataclass
class _Observation:
    """One micro-batch: its ESS moments [3], and whether its loss has been backpropagated (None: there is no loss to watch)."""

    moments: Tensor
    backpropagated: bool | None


class EssLearningRate:
    """Scales the learning rate of every `optimizer.step()` by the ESS of the batch, and restores it after the step.

    rate used = rate * min(1, rho / reference)^(1/2) ("sqrt", VCPO arXiv 2602.17616) or the first power ("linear"). rho is
    taken over all micro-batches observed since the last step, merged exactly, and over all ranks of `process_group`. It
    works through optimizer hooks: schedulers see and set the unscaled rate, before or after; AdamW default, foreach, fused
    and capturable honour it. A tensor learning rate is scaled in place, without a synchronisation; a float one costs one
    read of a scalar per step.

    Gradients that are thrown away take their observations with them: `optimizer.zero_grad()` forgets every observation
    whose loss was backpropagated, so a step that a GradScaler skipped does not leak into the next. Code that clears
    gradients elsewhere (`model.zero_grad()`), drops a batch after observing it, or observes log-weights (which have no loss
    to watch) and then skips the step calls `reset()`.

    A step that raises leaves the rate scaled until the next step or `reset()`. In `step(closure)` the rate is set before
    the closure runs, so observe before the step. The optimizer's hooks keep this object alive: it acts until `remove()`.

    Args:
        optimizer: any torch.optim.Optimizer.
        rule: "sqrt" or "linear".
        reference: rho_ref, the ratio from which on steps are full, > 0.
        process_group: a torch.distributed group over whose ranks ESS is taken; every rank must then step together.

    Attributes:
        ratio, scale: rho and the factor of the last step, 0-d tensors (None before the first).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> import torch, vcpo_kernels as vk
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> rate = vk.EssLearningRate(optimizer)
    >>> rate.observe(torch.tensor([0.0, -1e4, -1e4, -1e4]))  # log-weights: one of four sequences has all the weight
    >>> weight.grad = torch.ones(1); optimizer.step(); weight.item()
    -0.5
    >>> optimizer.param_groups[0]["lr"]
    1.0
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: str = "sqrt",
        reference: float = 1.0,
        process_group: Any = None,
    ) -> None:
        check = Check("EssLearningRate")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise check.type_error(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "Pass the inner optimizer of a wrapper (often `.optimizer`)."
            )
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise check.type_error(
                f"optimizer is a {type(optimizer).__name__} that wraps another and has no step hooks of its own. "
                "Pass the inner optimizer (often `.optimizer`)."
            )
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), EssLearningRate) for hook in hooks):
            raise check.value_error("optimizer has an EssLearningRate already. Call remove() on that one first.")
        for i, group in enumerate(optimizer.param_groups):
            if not isinstance(group.get("lr"), (Tensor, int, float, numbers.Real)):
                raise check.type_error(
                    f"optimizer's param_groups[{i}]['lr'] must be a number or a tensor, "
                    f"got {checks.describe(group.get('lr'))}. Give the optimizer a learning rate of its own."
                )
        check.choice("rule", rule, tuple(RULES))
        self.optimizer = optimizer
        self.exponent = RULES[rule]
        self.reference = check.positive_float("reference", reference)
        self.process_group = process_group
        self.ratio: Tensor | None = None
        self.scale: Tensor | None = None
        self._window: list[_Observation] = []
        self._unscaled: list[Any] | None = None  # a float per group, or a clone of its tensor
        self._warned = False
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._wrapped_zero_grad = _watch_zero_grad(optimizer, self)

    def observe(self, output: Observable | EffectiveSampleSize | Tensor) -> None:
        """Count a micro-batch in the ESS of the next step. Once per micro-batch, before or after its backward pass.

        output: what `vcpo_loss`, an objective or `effective_sample_size` returned, anything else with a `loss` and
            `ess_moments`, or log-weights [B].
        """
        if isinstance(output, Tensor):
            Check("EssLearningRate.observe").tensor("output", output, (torch.float32, torch.float64))
            moments = ess_moments(output.detach().flatten())
        elif isinstance(output, EffectiveSampleSize):
            moments = output.moments
        elif isinstance(output, Observable):
            moments = output.ess_moments
        else:
            raise TypeError(
                "EssLearningRate.observe: output must be a VCPOOutput, an EffectiveSampleSize or log-weights [B], or an "
                f"ObjectiveOutput, got {checks.describe(output)}."
            )
        observation = _Observation(moments, None)
        if isinstance(output, Observable) and output.loss.requires_grad:
            observation.backpropagated = _graph_is_freed(output.loss)
            watched = weakref.ref(observation)

            def mark(grad: Tensor) -> None:
                if (seen := watched()) is not None:
                    seen.backpropagated = True

            output.loss.register_hook(mark)
        self._window.append(observation)

    def reset(self) -> None:
        """Forget everything observed since the last step, and restore the rate if a step failed half-way."""
        self._window.clear()
        self._restore()

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        self.reset()
        for handle in self._handles:
            handle.remove()
        if self.optimizer.__dict__.get("zero_grad") is self._wrapped_zero_grad:
            del self.optimizer.__dict__["zero_grad"]

    def _gradients_cleared(self) -> None:
        self._window = [o for o in self._window if not o.backpropagated]

    def _merged(self) -> tuple[Tensor, Tensor] | None:
        """Moments [3] of the window over all ranks, and how many observations they hold (0-d); None: certainly none."""
        if not self._window and self.process_group is None:
            return None
        if self._window:
            device = self._window[0].moments.device
            merged = merge_moments(torch.stack([o.moments.to(device) for o in self._window]))
        else:
            parameters = (p for group in self.optimizer.param_groups for p in group["params"])
            device = next((p.device for p in parameters), torch.device("cpu"))
            merged = torch.tensor([-torch.inf, -torch.inf, 0.0], dtype=torch.float64, device=device)
        observed = merged.new_full((1,), len(self._window))
        if self.process_group is None:
            return merged, observed[0]
        mine = torch.cat([merged, observed])
        ranks = torch.distributed.get_world_size(self.process_group)
        gathered = [torch.empty_like(mine) for _ in range(ranks)]
        torch.distributed.all_gather(gathered, mine, group=self.process_group)
        every = torch.stack(gathered)
        return merge_moments(every[:, :3]), every[:, 3].sum()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._unscaled is not None and not self._window:
            return  # an overridden step() calls super().step(), whose hooks run again; or a failed step is tried again
        self._restore()
        merged = self._merged()
        self._window.clear()
        if merged is None:
            self._warn_unobserved()
            return
        moments, observed = merged
        ratio = ess_from_moments(moments)[1]
        scale = torch.nan_to_num(ratio / self.reference, nan=0.0).clamp(max=1.0) ** self.exponent
        self.ratio, self.scale = ratio, torch.where(observed > 0, scale, 1.0)  # nobody observed: full rate
        rates = [group["lr"] for group in optimizer.param_groups]
        self._unscaled = [r.clone() if isinstance(r, Tensor) else r for r in rates]
        for rate in {id(r): r for r in rates if isinstance(r, Tensor)}.values():  # groups may share one tensor
            rate.mul_(self.scale.to(rate.device, rate.dtype))
        if not all(isinstance(r, Tensor) for r in rates):
            factor = float(self.scale)
            if self.process_group is not None and not self._warned and float(observed) == 0:
                self._warn_unobserved()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if not isinstance(rate, Tensor):
                    group["lr"] = rate * factor

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()
        self._window.clear()  # a closure observed its batch too late for this step, and the next has its own

    def _warn_unobserved(self) -> None:
        if not self._warned:
            warnings.warn(
                "EssLearningRate: optimizer.step() without an observe() since the last one; the rate is left as it is. "
                "Call observe(out) once per micro-batch, before the step (not inside its closure).",
                UserWarning,
                stacklevel=5,
            )
            self._warned = True

    def _restore(self) -> None:
        if self._unscaled is None:
            return
        for group, rate in zip(self.optimizer.param_groups, self._unscaled, strict=False):
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._unscaled = None


def _graph_is_freed(loss: Tensor) -> bool:
    """Whether backward() ran through `loss` already (and freed its graph, as it does unless told to retain it)."""
    try:
        _ = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    except RuntimeError:
        return True
    except AttributeError:
        return False
    return False


def _watch_zero_grad(optimizer: torch.optim.Optimizer, owner: EssLearningRate) -> Any:
    """Have `optimizer.zero_grad` tell `owner` first; torch has a hook for step but none for this."""
    original = optimizer.zero_grad
    watched = weakref.ref(owner)

    def zero_grad(*args: Any, **kwargs: Any) -> None:
        if (alive := watched()) is not None:
            alive._gradients_cleared()
        original(*args, **kwargs)

    optimizer.__dict__["zero_grad"] = zero_grad
    return zero_grad
