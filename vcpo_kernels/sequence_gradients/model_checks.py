"""Which models SequenceGradients takes, and by which rule each of their modules.

Layer: parameters. What is refused here would give a number that is not the gradient's, or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import forget_detached_casts
from vcpo_kernels.head.patch_head import PatchedHead
from vcpo_kernels.parallel import fully_sharded
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
    _check_shards(check, model)


_WHOLE = "whole parameters are needed. Use FSDP2 (fully_shard), which is handled, or DistributedDataParallel."


def _check_shards(check: Check, model: nn.Module) -> None:
    units = fully_sharded.units_of(model)
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            at = f"{prefix}.{name}" if prefix else name
            if type(p).__name__ == "FlatParameter" or hasattr(p, "ds_status"):
                raise check.type_error(f"parameter {at!r} is sharded ({type(p).__name__}); {_WHOLE}")
            if not hasattr(p, "full_tensor"):
                continue
            given: Any = p
            if module not in units or not fully_sharded.shards_data(given):
                raise check.type_error(
                    f"parameter {at!r} is sharded over ranks that work on the same tokens, or by hand (DTensor, placements "
                    f"{given.placements}); {_WHOLE}"
                )
            if given.to_local().device.type != given.device_mesh.device_type:
                raise check.type_error(
                    f"parameter {at!r} is offloaded to the CPU (CPUOffloadPolicy), where no gradient is formed. Leave "
                    "offload_policy out of fully_shard."
                )


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


def rules_of(check: Check, model: nn.Module) -> list[tuple[nn.Module, str, Rule, tuple[str, ...]]]:
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
    forward = module.__dict__.get("forward")
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
