"""EssLearningRate: scale each optimizer step by the effective sample size of the batch behind it.

Layer: scalars. eta_eff = eta * min(1, rho / rho_ref)^exponent, rho = ESS / B of everything observed since the last step.
"""

from __future__ import annotations

import inspect
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.sequences.ess import EffectiveSampleSize, ess_from_moments, merge_moments
from vcpo_kernels.step_size.group_rates import GroupRates
from vcpo_kernels.step_size.observed import Observable, moments_and_loss
from vcpo_kernels.step_size.repeated import SteppedParameters
from vcpo_kernels.step_size.window import Window, watch_zero_grad

RULES: dict[str, float] = {"sqrt": 0.5, "linear": 1.0}  # exponent of min(1, rho / rho_ref)

# Whose step does not use the rate of that step, and what that means here.
INDIFFERENT: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.Rprop: "uses its rate in its first step alone, so that later steps are not scaled",
    torch.optim.ASGD: "takes each step at the rate of the step before, so that ESS acts one step late",
}


class EssLearningRate:
    """Scales the learning rate of every `optimizer.step()` by the ESS of the batch, and restores it after the step.

    rate used = rate * min(1, rho / reference)^(1/2) ("sqrt", VCPO arXiv 2602.17616) or the first power ("linear"). rho is
    taken over all micro-batches observed since the last step, merged exactly, and over all ranks of `process_group`. It
    works through optimizer hooks: schedulers see and set the unscaled rate, before or after; AdamW default, foreach, fused
    and capturable honour it. A tensor learning rate is scaled in place, without a synchronisation; a float one costs one
    read of a scalar per step.

    Gradients that are thrown away take their observations with them, so that a step that a GradScaler skipped does not leak
    into the next, whatever was observed (an output, an ESS, log-weights) and whatever was backpropagated (its loss, or in two
    phases another): `optimizer.zero_grad()`, or `model.zero_grad()`, forgets every observation that a gradient has followed
    since, and in loops that observe after their backwards all of them. An observation made ahead of its backward stays. The
    order of a loop is read off the first observation after a step or clearing: whether gradients had arrived before it.
    `reset()` is for what cannot be seen: a batch dropped between its observation and its backward,
    `model.zero_grad(set_to_none=False)`, and `model.zero_grad()` where `SequenceGradients.accumulate_` wrote the gradients.

    What others set during a step stays: a scheduler stepped in a post hook and a closure find the unscaled rate there, and a
    step goes on at the factor times what its closure set. Other code inside the step (a pre hook registered later, an
    overridden `step`) finds the scaled rate: it may set another, but one that it multiplies is not divided back.

    Under DeepSpeed pass the inner optimizer, `engine.optimizer.optimizer` with ZeRO: its step may be called once for each group
    or sub-group of parameters, and the factor, taken at the first, is that of all of them. Under Megatron pass the inner ones,
    `integrations.megatron.ess_rates(optimizer)`, and call `reset()` after a step that it skips.

    A step that raises leaves the rate scaled until the next step or `reset()`. In `step(closure)` ESS is taken before the
    closure runs, so observe before the step. The optimizer's hooks keep this object alive: it acts until `remove()`.

    Args:
        optimizer: any torch.optim.Optimizer.
        rule: "sqrt" or "linear".
        reference: rho_ref, the ratio from which on steps are full, > 0.
        process_group: a torch.distributed group over whose ranks ESS is taken; every rank must then step together.

    Attributes:
        ratio, scale: rho and the factor of the last step, 0-d tensors (None before the first).

    Raises:
        TypeError, ValueError: naming the argument; for an optimizer without a rate of its own, such as an Adafactor with
        relative_step=True. Warns of Rprop and ASGD, which do not take a step at that step's rate.

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
        _check_optimizer(check, optimizer)
        check.choice("rule", rule, tuple(RULES))
        self.optimizer = optimizer
        self.exponent = RULES[rule]
        self.reference = check.positive_float("reference", reference)
        self.process_group = process_group
        self.ratio: Tensor | None = None
        self.scale: Tensor | None = None
        self._window = Window(optimizer)
        self._rates = GroupRates()
        self._observed = torch.zeros((), device="cpu")  # how many observations the step has, over all ranks
        self._number: float | None = None  # scale, read at this step for rates that are floats
        self._stepping = False
        self._stepped, self._scales = SteppedParameters(), False
        self._warned = False
        self._handles: list[RemovableHandle] = [
            # A compiled step calls them as they are: what they look at is no part of a graph.
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),
        ]
        # Whoever else has a hook behind the step (a scheduler stepped there) finds the rate restored.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._handles[-1].id, last=False)
        self._unwatch = watch_zero_grad(optimizer, self._window)

    @torch._disable_dynamo  # as torch.optim does: torch.compiler.disable would import dynamo here
    def observe(self, output: Observable | EffectiveSampleSize | Tensor) -> None:
        """Count a micro-batch in the ESS of the next step. Once per micro-batch, before or after its backward pass.

        output: what `vcpo_loss`, an objective or `effective_sample_size` returned, anything else with a `loss` and
            `ess_moments`, or log-weights [B] without a gradient (float32 or float64; a [B] of anything else, such as
            advantages, cannot be told from them).

        Raises TypeError, ValueError for what has no ESS: one number (`out.loss`), log-ratios of tokens, statistics of
        tokens, several outputs at once.
        """
        self._window.add(*moments_and_loss(output))

    def reset(self) -> None:
        """Forget everything observed since the last step, and restore the rate if a step failed half-way."""
        self._stepped.clear()
        self._finish()

    def _finish(self) -> None:
        self._window.clear()
        self._window.settle()
        self._rates.restore()
        self._stepping = False

    def remove(self) -> None:
        """Leave the optimizer and its parameters as they were found."""
        self.reset()
        self._window.remove()
        for handle in self._handles:
            handle.remove()
        self._unwatch()

    def _merged(self, taken: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Moments [3] of the step over all ranks, and how many observations they hold (0-d); None: certainly none."""
        if not taken and self.process_group is None:
            return None
        if taken:
            merged = merge_moments(torch.stack([m.to(taken[0].device) for m in taken]))
        else:
            parameters = (p for group in self.optimizer.param_groups for p in group["params"])
            device = next((p.device for p in parameters), torch.device("cpu"))
            merged = torch.tensor([-torch.inf, -torch.inf, 0.0], dtype=torch.float64, device=device)
        observed = merged.new_full((1,), len(taken))
        if self.process_group is None:
            return merged, observed[0]
        mine = torch.cat([merged, observed])
        ranks = torch.distributed.get_world_size(self.process_group)
        gathered = [torch.empty_like(mine) for _ in range(ranks)]
        torch.distributed.all_gather(gathered, mine, group=self.process_group)
        every = torch.stack(gathered)
        return merge_moments(every[:, :3]), every[:, 3].sum()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if optimizer is not self.optimizer:
            return None  # a copy that took the hooks along
        # An overridden step() calls super().step(), whose hooks run again; or a failed step is tried again.
        again = self._stepping and not self._window
        if again and self._rates.scaled:
            return None
        if not again:
            self._rates.restore()
            if self._window or not self._stepped.go_on_with(optimizer):
                self._begin()
            self._stepped.add(optimizer)
            if not self._scales:
                return None
            self._stepping = True
        self._scale()
        if (
            self._number is not None
            and self.process_group is not None
            and not self._warned
            and float(self._observed) == 0
        ):
            self._warn_unobserved()
        return self._around_closure(args, kwargs)

    def _begin(self) -> None:
        """A step: its factor, of all that was observed."""
        self._stepped.clear()
        self._number = None
        with torch.no_grad():
            merged = self._merged(self._window.take())
            self._scales = merged is not None
            if merged is not None:
                self._set_scale(*merged)
        if merged is None:
            self._warn_unobserved()

    def _set_scale(self, moments: Tensor, observed: Tensor) -> None:
        ratio = ess_from_moments(moments)[1]
        scale = torch.nan_to_num(ratio / self.reference, nan=0.0).clamp(max=1.0) ** self.exponent
        self.ratio, self.scale = ratio, torch.where(observed > 0, scale, 1.0)  # nobody observed: full rate
        self._observed = observed

    def _scale(self) -> None:
        assert self.scale is not None
        self._number = self._rates.scale(self.optimizer, self.scale, self._number)

    def _around_closure(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The step's arguments with a closure that finds the unscaled rate, and may set it."""
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(given):
            return None

        def closure(*a: Any, **k: Any) -> Any:
            self._rates.restore()
            result = given(*a, **k)
            self._scale()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self.optimizer:
            self._finish()  # a closure observed its batch too late for this step, and the next has its own

    def _warn_unobserved(self) -> None:
        if not self._warned:
            warnings.warn(
                "EssLearningRate: optimizer.step() without an observe() since the last one; the rate is left as it is. "
                "Call observe(out) once per micro-batch, before the step (not inside its closure).",
                UserWarning,
                stacklevel=6,
            )
            self._warned = True


def _check_optimizer(check: Check, optimizer: Any) -> None:
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
    if any(isinstance(getattr(inspect.unwrap(hook), "__self__", None), EssLearningRate) for hook in hooks):
        raise check.value_error("optimizer has an EssLearningRate already. Call remove() on that one first.")
    for i, group in enumerate(optimizer.param_groups):
        if not isinstance(group.get("lr"), (Tensor, int, float, numbers.Real)):
            raise check.type_error(
                f"optimizer's param_groups[{i}]['lr'] must be a number or a tensor, "
                f"got {checks.describe(group.get('lr'))}. Give the optimizer a learning rate of its own."
            )
        if group.get("relative_step"):
            raise check.value_error(
                f"optimizer's param_groups[{i}] has relative_step=True: {type(optimizer).__name__} then makes its own "
                "rate and ignores 'lr'. Build it with relative_step=False and lr=..."
            )
    for kind, why in INDIFFERENT.items():
        if isinstance(optimizer, kind):
            warnings.warn(f"EssLearningRate: {kind.__name__} {why}.", UserWarning, stacklevel=3)
