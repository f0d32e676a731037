"""Which models SequenceGradients takes, and by which rule each of their modules.

Layer: parameters. What is refused here would give a number that is not the gradient's, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import forget_detached_casts
from vcpo_kernels.head.patch_head import PatchedHead
from vcpo_kernels.parallel import tensor_parallel
from vcpo_kernels.parallel.tensor_parallel import Part
from vcpo_kernels.sequence_gradients.module_rules import (
    EMBEDDING,
    LINEAR,
    Rule,
    normal_like,
    rule_of,
    whole_parameters,
)


def check_model(check: Check, model: nn.Module) -> None:
    """Raise where a graph has no modules to capture, or a rank or replica holds a part of the parameters or the batch."""
    for name, module in model.named_modules():
        at = name or "the model"
        if _is_compiled(module):
            raise check.type_error(
                f"{type(module).__name__} ({at}) is compiled, and a compiled graph has no modules to capture. Pass the model "
                "before torch.compile, or, where parameters are whole, use OPOBAccumulator."
            )
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise check.type_error(
                f"{at} is a {type(module).__name__}, whose reduction of gradients accumulate_ does not run. Pass the model "
                "that DistributedDataParallel itself wraps, or DistributedDataParallel around the whole."
            )
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise check.type_error(f"{at} is sharded ({type(module).__name__}); {_WHOLE}")


_WHOLE = "whole parameters are needed. Use FSDP2 (fully_shard), which is handled, or DistributedDataParallel."
# Styles of transformers' tp_plan under which a module's output gradient is whole, or its own part of it.
_STYLES = (
    "ColwiseParallel",
    "RowwiseParallel",
    "EmbeddingParallel",
    "ReplicatedWithGradAllReduce",
    "TensorParallelLayer",
)


def parts_of(check: Check, model: nn.Module, units: dict[nn.Module, Any]) -> dict[Tensor, Part]:
    """Of each parameter that tensor parallelism shares, this rank's part while its module works. units: FSDP2's.

    Raises TypeError where a rank has what nothing is known of.
    """
    found: dict[Tensor, Part] = {}
    for prefix, module in model.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, p in own.items():
            at = f"{prefix}.{name}" if prefix else name
            if type(p).__name__ == "FlatParameter" or hasattr(p, "ds_status"):
                raise check.type_error(f"parameter {at!r} is sharded ({type(p).__name__}); {_WHOLE}")
            if checks.is_dtensor(p):
                part = _part_of(check, at, p, module in units)
                found |= {} if part is None else {p: part}
        style = tensor_parallel.style_of(module)
        if style is not None and style not in _STYLES and any(p.requires_grad for p in own.values()):
            raise check.type_error(
                f"{prefix} is under transformers' tensor parallel style {style}, of which no gradients by sequence are known. "
                f"Known are {', '.join(_STYLES)}. Change its entry of tp_plan, or freeze its parameters."
            )
        _check_parts(check, prefix, module, found)
    return found


def _part_of(check: Check, at: str, parameter: Any, gathers_data: bool) -> Part | None:
    local = parameter.to_local()
    if local.device.type != parameter.device_mesh.device_type:
        raise check.type_error(
            f"parameter {at!r} is offloaded to the CPU (CPUOffloadPolicy), where no gradient is formed. Leave "
            "offload_policy out of fully_shard."
        )
    try:
        return tensor_parallel.part_of(parameter, gathers_data)
    except ValueError:
        raise check.type_error(
            f"parameter {at!r} is a DTensor with placements {parameter.placements} on a mesh "
            f"{tuple(parameter.device_mesh.shape)}, of which no gradients by sequence are known. Known are fully_shard's, "
            "tensor parallelism's over one dimension of the mesh, whole or split once (ColwiseParallel, RowwiseParallel, "
            "SequenceParallel), and both together on a mesh with names, tensor parallelism last."
        ) from None


def _check_parts(check: Check, prefix: str, module: nn.Module, parts: dict[Tensor, Part]) -> None:
    """Raise unless a module's parameters are split together, as its rule takes them."""
    weight, bias = (parts.get(p) if p is not None else None for p in map(module._parameters.get, ("weight", "bias")))
    if weight is None or weight.dim is None:
        return
    of_outputs = isinstance(module, nn.Linear) == (weight.dim == 0)
    known = isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__.endswith("Conv1D")
    if known and (bias is None or (bias.dim is not None) == of_outputs):
        return
    if any(p is not None and p.requires_grad for p in module._parameters.values()):
        raise check.type_error(
            f"{prefix} ({type(module).__name__}) has a weight split in dimension {weight.dim}"
            f"{'' if bias is None else f' and a bias {_layout(bias)}'}, of which no gradients by sequence are known. Wanted is "
            "what ColwiseParallel or RowwiseParallel makes of a Linear or an Embedding."
        )


def _layout(part: Part) -> str:
    return "whole" if part.dim is None else f"split in dimension {part.dim}"


def check_hooks(check: Check, names: dict[Tensor, str]) -> None:
    """Raise where others act on a parameter's gradient: nobody would call them."""
    for p, name in names.items():
        hooks = (*(p._backward_hooks or {}).values(), *(getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())
        if not all(
            getattr(hook, "only_watches", False) for hook in hooks
        ):  # as EssLearningRate's, which looks by itself too
            raise check.runtime_error(
                f"parameter {name!r} has a hook that autograd calls with its gradient (register_hook, "
                "register_post_accumulate_grad_hook), which no backward forms here: norms and accumulate_ would be without it. "
                "Remove it and change parameter.grad after accumulate_, or, where parameters are whole, use OPOBAccumulator."
            )


Captured = tuple[nn.Module, str, Rule, tuple[str, ...]]


def rules_of(check: Check, model: nn.Module) -> list[Captured]:
    """Each module with trainable parameters of its own: module, name, rule, names of those parameters."""
    found, problems = [], []
    for name, module in model.named_modules():
        own = tuple(n for n, p in module._parameters.items() if p is not None and p.requires_grad)
        if not own:
            continue
        rule = rule_of(module)
        if isinstance(rule, Rule) and not _is_what_its_class_says(module, rule):
            rule = "its forward was replaced by one that computes something else"
        if isinstance(rule, str):
            problems.append(f"  {name or '(the model itself)'} ({type(module).__name__}; {', '.join(own)}): {rule}")
        else:
            found.append((module, name, rule, own))
    if problems:
        raise check.value_error(
            "no exact per-sequence gradients for these modules:\n" + "\n".join(problems) + "\n"
            "Freeze their parameters (requires_grad_(False)), or, where they are whole, use OPOBAccumulator, which takes any "
            "model."
        )
    if not found:
        raise check.value_error(f"{type(model).__name__} has no parameter that requires a gradient.")
    return found


def check_logits(check: Check, rules: list[Captured], widths: frozenset[int], part: Callable[..., Part | None]) -> None:
    """Raise where a plain weight may have made logits that hold a shard of the vocabulary. widths: of such logits."""
    for module, name, rule, own in rules:
        weight = module._parameters.get("weight")
        if rule is not LINEAR or "weight" not in own or weight is None or part(module, "weight") is not None:
            continue
        if len(weight) in widths:
            raise check.runtime_error(
                f"the logits are a shard of the vocabulary (vocabulary=), and {name}, which may have made them, has a plain "
                "weight: nothing says that other ranks have the rest of it. Make it a DTensor (parallelize_module with "
                "ColwiseParallel), use the fused head with vocabulary=, or freeze it."
            )


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module), module.compile(), or a compiled function in place of its forward."""
    forward: Any = module.forward
    return (
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


@torch.no_grad()
def _is_what_its_class_says(module: nn.Module, rule: Rule) -> bool:
    """False where a forward of the instance's own computes something else: fused kernels and accelerate put one that does not.

    A patched head's output takes no gradient; linear_token_stats has its weight's.
    """
    forward = tensor_parallel.forward_inside(module)
    if forward is None or isinstance(getattr(forward, "__self__", None), PatchedHead):
        return True
    weight: Any = module._parameters["weight"]
    if rule is EMBEDDING:
        x = torch.arange(min(3, len(weight)), device=weight.device)
    else:
        width = weight.shape[1] if rule is LINEAR else weight.shape[0]
        x = normal_like(weight, 3, width)
    tolerance = 8 * torch.finfo(weight.dtype).eps
    try:
        with whole_parameters(module):
            got, want = forward(x), type(module).forward(module, x)
        forget_detached_casts(got)
        return torch.allclose(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    except Exception:  # it wants another call, or returns another thing
        return False
