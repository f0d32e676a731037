"""Megatron-core: its process groups as `Ranks`, and rates on the optimizers inside its own. docs/megatron.md has the loop.

Megatron is imported where it is called for, never at import.
"""

from __future__ import annotations

from typing import Any

import torch

from vcpo_kernels.core.checks import Check
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.ranks import Ranks, world
from vcpo_kernels.step_size import EssLearningRate


def ranks(averaged: bool = True, uneven: bool = False) -> Ranks:
    """Data, sequence (context) and vocabulary (tensor) ranks of `megatron.core.parallel_state`.

    averaged: Megatron averages gradients over data and context ranks, unless it divides them by a number of tokens, which a
    loss function can return as 1 for each micro-batch: then it does too. uneven: see `Ranks`.

    Raises RuntimeError before `initialize_model_parallel`.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        raise Check("megatron.ranks").runtime_error(
            "Megatron has no process groups yet. Call it after megatron.core.parallel_state.initialize_model_parallel(...)."
        )
    return Ranks(
        data=parallel_state.get_data_parallel_group(),
        sequence=parallel_state.get_context_parallel_group(),
        vocabulary=parallel_state.get_tensor_model_parallel_group(),
        averaged=averaged,
        uneven=uneven,
    )


def ess_rates(optimizer: Any, rule: str = "sqrt", reference: float = 1.0) -> list[EssLearningRate]:
    """An EssLearningRate on each torch optimizer inside Megatron's, with ESS over all ranks: a call that all ranks make.

    Give each of them every loss, `rate.observe(out)`. Data ranks whose outputs are the step's own (`ranks=`), and tensor and
    context ranks, count their sequences several times, all alike, which leaves ESS / B as it is; pipeline stages without the
    loss take part with nothing. After a step that Megatron skipped, `rate.reset()`.

    Raises TypeError where no torch optimizer is found, and ValueError where ranks have different numbers of them, so that one
    would wait for the others in the step.
    """
    check = Check("megatron.ess_rates")
    return [EssLearningRate(one, rule, reference, world()) for one in checked_optimizers(check, optimizer)]


def checked_optimizers(check: Check, optimizer: Any) -> list[torch.optim.Optimizer]:
    """`torch_optimizers`, of which every rank must have as many, and one at least."""
    inner = torch_optimizers(optimizer)
    counts = [len(inner)]
    if world() is not None:
        counts = collectives.gathered(torch.tensor(len(inner), device=_device()), world()).tolist()
    if not all(counts):
        raise check.type_error(
            f"found no torch.optim.Optimizer inside {type(optimizer).__name__}"
            + ("." if len(counts) == 1 else f" on {counts.count(0)} of {len(counts)} ranks.")
        )
    if len(set(counts)) > 1:
        raise check.value_error(
            f"ranks must have as many torch optimizers inside {type(optimizer).__name__} as each other, got {counts}: each "
            "takes ESS over all ranks at its step, where some would wait for ever. Give each an EssLearningRate of your own, "
            "whose process_group are the ranks that have it."
        )
    return inner


def _device() -> torch.device:
    """Where a rank has tensors that its process group can send, whether it has parameters or their optimizer is on a CPU."""
    backend = torch.distributed.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers that step inside Megatron's: of a chain all, of a wrapper the wrapped one, of a stub none.

    >>> import torch
    >>> from vcpo_kernels.integrations.megatron import torch_optimizers
    >>> len(torch_optimizers(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])))
    1
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    if hasattr(optimizer, "chained_optimizers"):
        return [inner for part in optimizer.chained_optimizers for inner in torch_optimizers(part)]
    inner = getattr(optimizer, "optimizer", None)
    return [] if inner is None else torch_optimizers(inner)
