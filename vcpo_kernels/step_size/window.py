"""The observations since the last step, and which of them have gone into the gradients that the optimizer holds."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


@dataclass(eq=False)
class _Observation:
    """moments: [3]. leads: made ahead of its backward. followed: a gradient has arrived since."""

    moments: Tensor
    leads: bool
    followed: bool = False


class Window:
    """Observations of micro-batches, forgotten with the gradients that they went into.

    Which backward belongs to which observation cannot be asked of the loss: in two phases, or with gradients by sequence, it
    is never backpropagated. What can be seen is when gradients arrive: autograd accumulates into a parameter (a hook), a
    loss that is watched is backpropagated (a hook), or `param.grad` is another than when it was last looked at (code that
    writes it). So, of all that happens since the last step or clearing:

    - a gradient that arrives belongs to every observation made before it;
    - where gradients arrived before the first observation, the loop observes after its backwards, and an observation
      belongs to what has arrived;
    - otherwise the loop observes ahead, and an observation without a gradient after it is one for the coming step.

    Gradients are gone at `optimizer.zero_grad()`, and where all of them are None that were not (`model.zero_grad()`). What
    is judged by the order alone goes when the next gradient arrives: a step before that still counts it. Nothing of a graph
    or a device is read.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.watching = True
        self._observations: list[_Observation] = []
        self._held: list[_Observation] = []  # forgotten unless a step comes before any gradient
        self._arrived = False  # a gradient, since the last step or clearing
        self._unseen = False  # a gradient, by autograd, since the last look
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id of the parameter: its gradient and version
        self._hooks: dict[int, RemovableHandle] = {}
        weakref.finalize(self, _remove, self._hooks)
        self.settle()

    def __len__(self) -> int:
        return len(self._held) + len(self._observations)

    def add(self, moments: Tensor, loss: Tensor | None) -> None:
        """Count a micro-batch. loss: where its backward is to be noticed even if no gradient reaches the parameters before
        the step (copies in another precision, sharded parameters).
        """
        self._look()
        leads = not self._arrived or any(o.leads for o in self._observations)
        observation = _Observation(moments, leads)
        self._observations.append(observation)
        if loss is None or not loss.requires_grad:
            return
        seen, window = weakref.ref(observation), weakref.ref(self)

        def mark(grad: Tensor) -> None:
            if (one := seen()) is not None and (mine := window()) is not None:
                mine._look()  # what went before was thrown away before this arrives
                one.followed = True

        loss.register_hook(mark)

    def take(self) -> list[Tensor]:
        """The moments of this step's observations, which are then forgotten."""
        self._look()
        taken = [o.moments for o in (*self._held, *self._observations)]
        self.clear()
        return taken

    def clear(self) -> None:
        self._held.clear()
        self._observations.clear()

    def clearing(self) -> None:
        """Gradients are about to be cleared; `settle` when they are."""
        self._look()
        self._forget()

    def settle(self) -> None:
        """Take the gradients as they are: used by a step, or cleared. What is in them counts no more."""
        self._look()
        self._arrived = False

    def remove(self) -> None:
        """Take the hooks off the parameters, for good."""
        self.watching = False
        _remove(self._hooks)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[Tensor]:
        if (optimizer := self._optimizer()) is not None:
            for group in optimizer.param_groups:
                yield from group["params"]

    def _look(self) -> None:
        """Notice what came or went otherwise than by autograd; autograd's next arrival is then the first again."""
        now = {id(p): _state_of(p.grad) for p in self._parameters() if p.grad is not None}
        if not now and (self._arrived or self._seen):
            self._gone()
        elif any(_differs(self._seen.get(key), state) for key, state in now.items()):
            self._arrive()
        self._seen, self._unseen = now, False
        for p in self._parameters():
            if self.watching and id(p) not in self._hooks and p.requires_grad and p.is_leaf:
                self._hooks[id(p)] = p.register_post_accumulate_grad_hook(_hook(weakref.ref(self)))

    def _accumulated(self, parameter: Tensor) -> None:
        if self._unseen:
            return
        grad, before = parameter.grad, self._seen.get(id(parameter))
        if grad is None:  # autograd came by with nothing, as in a backward for activation gradients only
            if before is not None:
                self._look()  # what is gone shows
            return
        if before is not None and not _differs(before, _state_of(grad)):
            return
        self._unseen = True
        if self._seen and all(
            p.grad is None or (p is parameter and _is_new(before, p.grad)) for p in self._parameters()
        ):
            self._gone()  # there were gradients, and this one is the first again
        self._arrive()

    def _arrive(self) -> None:
        self._arrived = True
        self._held.clear()
        for o in self._observations:
            o.followed = True

    def _gone(self) -> None:
        """No parameter has the gradient that it had: cleared, or moved. Megatron's DistributedDataParallel adds each to
        `main_grad` as it arrives and takes it off its parameter; only `clearing` is told then.
        """
        if not any(hasattr(p, "main_grad") for p in self._parameters()):
            self._forget()

    def _forget(self) -> None:
        self._held += [o for o in self._observations if not (o.leads or o.followed)]
        self._observations = [o for o in self._observations if o.leads and not o.followed]
        self._arrived, self._seen = False, {}


def _hook(window: weakref.ref[Window]) -> Any:
    @torch.compiler.disable
    def accumulated(parameter: Tensor) -> None:
        if (alive := window()) is not None:
            alive._accumulated(parameter)

    accumulated.only_watches = True  # `SequenceGradients`, which calls no hooks, refuses all others
    return accumulated


def _remove(hooks: dict[int, RemovableHandle]) -> None:
    for handle in hooks.values():
        handle.remove()
    hooks.clear()


def _state_of(grad: Tensor) -> tuple[weakref.ref[Tensor], int]:
    # FSDP2 accumulates into what a DTensor wraps.
    local = grad if type(grad) is Tensor else getattr(grad, "_local_tensor", grad)
    return weakref.ref(grad), 0 if local.is_inference() else local._version


def _differs(before: tuple[weakref.ref[Tensor], int] | None, now: tuple[weakref.ref[Tensor], int]) -> bool:
    return before is None or before[0]() is not now[0]() or before[1] != now[1]


def _is_new(before: tuple[weakref.ref[Tensor], int] | None, grad: Tensor) -> bool:
    """Whether autograd began a gradient anew rather than add to the one seen (out of place only where it has a graph)."""
    return before is None or (before[0]() is not grad and grad.grad_fn is None)


def watch_zero_grad(optimizer: torch.optim.Optimizer, window: Window) -> Callable[[], None]:
    """Have `optimizer.zero_grad` tell `window`; torch has a hook for step but none for this. Returns what undoes it.

    It stays a method with its signature, which accelerate looks up, and a copy of the optimizer clears its own gradients.
    """
    found: Any = optimizer.__dict__.get("zero_grad")  # somebody else's
    original = optimizer.zero_grad
    bound = getattr(original, "__self__", None) is optimizer
    function: Callable[..., Any] = original.__func__ if bound else original  # type: ignore[attr-defined]
    watched = weakref.ref(window)

    @torch.compiler.disable
    @functools.wraps(function)
    def zero_grad(*args: Any, **kwargs: Any) -> Any:
        alive = watched()
        if alive is None or not alive.watching or (bound and args[0] is not alive._optimizer()):
            return function(*args, **kwargs)
        alive.clearing()
        try:
            return function(*args, **kwargs)
        finally:
            alive.settle()

    put = types.MethodType(zero_grad, optimizer) if bound else zero_grad
    optimizer.__dict__["zero_grad"] = put

    def undo() -> None:
        if optimizer.__dict__.get("zero_grad") is put:
            if found is None:
                del optimizer.__dict__["zero_grad"]
            else:
                optimizer.__dict__["zero_grad"] = found

    return undo
