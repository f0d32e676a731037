"""What each kind of module's input and output gradient make of its parameters' gradients, sequence by sequence.

Layer: tokens. `rule_of` has the table; adding a kind of module is adding a function and a line there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vcpo_kernels.core import checks
from vcpo_kernels.core.dtypes import widened
from vcpo_kernels.sequence_gradients.factors import Lookup, ParameterGradient, product_of
from vcpo_kernels.sequence_gradients.row_owners import RowOwners, Spans

Gradients = dict[str, ParameterGradient]  # of a module's own parameters that take part, by their names in it


@dataclass(frozen=True)
class Rule:
    """How one kind of module's gradients are had by sequence.

    parameters: the names it may have. record: (module, site, owners, input, output gradient, gradients) adds the uses.
    """

    parameters: frozenset[str]
    record: Callable[[nn.Module, str, RowOwners, Tensor, Tensor, Gradients], None]


def _linear(module: nn.Module, site: str, owners: RowOwners, x: Tensor, grad: Tensor, into: Gradients) -> None:
    """y = x W^T + b: dW = sum_t grad_t x_t^T, db = sum_t grad_t."""
    spans, (g, a) = owners.by_sequence(site, grad, x.to(grad.dtype))
    if "weight" in into:
        into["weight"].products.append(product_of(g, a, spans))
    if "bias" in into:
        into["bias"].add_whole(spans.sums(g))


def _conv1d(module: nn.Module, site: str, owners: RowOwners, x: Tensor, grad: Tensor, into: Gradients) -> None:
    """transformers' Conv1D, y = x W + b: its weight is a Linear's transposed."""
    spans, (g, a) = owners.by_sequence(site, grad, x.to(grad.dtype))
    if "weight" in into:
        into["weight"].products.append(product_of(g, a, spans, transposed=True))
    if "bias" in into:
        into["bias"].add_whole(spans.sums(g))


def _embedding(module: nn.Module, site: str, owners: RowOwners, x: Tensor, grad: Tensor, into: Gradients) -> None:
    """y_t = W[x_t], times a scale where the module has one; padding_idx takes no gradient."""
    spans, (g, ids) = owners.by_sequence(site, grad, x.unsqueeze(-1))
    ids = ids[:, 0].to(torch.int64)
    if type(module).forward is not nn.Embedding.forward:
        scale: Any = module.embed_scale
        g = g * torch.as_tensor(scale, device=g.device).to(g.dtype)
    padding: Any = module.padding_idx
    if padding is not None:
        g = torch.where(torch.eq(ids, padding)[:, None], 0.0, g)
    into["weight"].lookups.append(Lookup(ids, g, spans))


def _elementwise(module: nn.Module, site: str, owners: RowOwners, x: Tensor, grad: Tensor, into: Gradients) -> None:
    """y = f(x) w + rest(x) + b, whatever f is: f(x) is what a weight of 1 adds to a weight of 0."""
    _add_scaled(
        owners.by_sequence(site, grad, x), into, lambda a: _with_weight(module, a, 1.0) - _with_weight(module, a, 0.0)
    )


def _scaling(module: nn.Module, site: str, owners: RowOwners, x: Tensor, grad: Tensor, into: Gradients) -> None:
    """The same without a rest, as most are: one forward less."""
    _add_scaled(owners.by_sequence(site, grad, x), into, lambda a: _with_weight(module, a, 1.0))


def _add_scaled(
    by_sequence: tuple[Spans, list[Tensor]], into: Gradients, scaled_of: Callable[[Tensor], Tensor]
) -> None:
    """dw = sum_t grad_t scaled_t, db = sum_t grad_t."""
    spans, (g, a) = by_sequence
    if "weight" in into:
        into["weight"].add_whole(spans.sums(widened(g) * scaled_of(a)))
    if "bias" in into:
        into["bias"].add_whole(spans.sums(g))


@torch.no_grad()
def _with_weight(module: nn.Module, x: Tensor, weight: float | Tensor) -> Tensor:
    """The module's output with this weight and no bias, its hooks aside."""
    own = dict(module._parameters)
    try:
        for name, parameter in own.items():
            if parameter is not None:
                value = weight if name == "weight" else 0.0
                plain = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                module._parameters[name] = plain.add_(value)  # type: ignore[assignment]
        output: Tensor = type(module).forward(module, x)
        return output
    finally:
        module._parameters.update(own)


LINEAR = Rule(frozenset({"weight", "bias"}), _linear)
CONV1D = Rule(frozenset({"weight", "bias"}), _conv1d)
EMBEDDING = Rule(frozenset({"weight"}), _embedding)
ELEMENTWISE = Rule(frozenset({"weight", "bias"}), _elementwise)
SCALING = Rule(frozenset({"weight", "bias"}), _scaling)

_FORWARDS: dict[Any, Rule] = {nn.Linear.forward: LINEAR, nn.Embedding.forward: EMBEDDING}
_CLASSES: dict[str, Rule] = {"transformers.pytorch_utils.Conv1D": CONV1D}
_NORM = re.compile(r"(RMSNorm|LayerNorm)$")  # of any library, once a probe has shown it to be what the name says
_SCALED_EMBEDDING = re.compile(r"ScaledWordEmbedding$")  # Gemma-3's and Bart's kin: an nn.Embedding times embed_scale


def rule_of(module: nn.Module) -> Rule | str:
    """The rule for a module with parameters of its own, or why there is none."""
    kind = type(module)
    rule = _FORWARDS.get(kind.forward) or _of_class(kind)
    if rule is None and isinstance(module, nn.Embedding) and _SCALED_EMBEDDING.search(kind.__name__):
        rule = EMBEDDING if _is_scaled_lookup(module) else None
    if rule is None and _NORM.search(kind.__name__):
        rule = _probed(module)
    if rule is None:
        return "no rule for this kind of module"
    unknown = {n for n, p in module._parameters.items() if p is not None} - rule.parameters
    if unknown:
        return f"no rule for its {', '.join(sorted(unknown))}"
    if rule is EMBEDDING and (module.sparse or module.scale_grad_by_freq):
        return "sparse and scale_grad_by_freq give gradients that are not a sum over tokens"
    return rule


def _of_class(kind: type[nn.Module]) -> Rule | None:
    """By the class's name, or that of the class which fully_shard made this one of."""
    names = (f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__ if getattr(c, "forward", None) is kind.forward)
    return next((_CLASSES[name] for name in names if name in _CLASSES), None)


@contextlib.contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, a sharded module's own parameters are whole, of other numbers: for probes of what its forward computes."""
    own = dict(module._parameters)
    try:
        for name, p in own.items():
            if p is not None and checks.is_dtensor(p):
                module._parameters[name] = normal_like(p, *p.shape)  # type: ignore[assignment]
        yield
    finally:
        module._parameters.update(own)


@torch.no_grad()
def _is_scaled_lookup(module: nn.Embedding) -> bool:
    """Whether its output is embed_scale times its row."""
    ids = torch.arange(min(2, module.num_embeddings), device=module.weight.device)
    try:
        with whole_parameters(module):
            weight: Any = module._parameters["weight"]
            want = weight[ids] * torch.as_tensor(module.embed_scale, device=weight.device).to(weight)
            return torch.allclose(type(module).forward(module, ids), want)
    except Exception:  # no embed_scale, or a call of another kind
        return False


def normal_like(like: Tensor, *shape: int) -> Tensor:
    """Normal numbers that are the same in every call, on whatever device and under whatever defaults."""
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    normal = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(0), **options)
    return normal.to(device=like.device, dtype=like.dtype)


def _probed(module: nn.Module) -> Rule | None:
    """The rule of a norm: whether its output is affine in a 1-D weight entry by entry, and with what rest."""
    weight = module._parameters.get("weight")
    if (
        weight is None
        or weight.dim() != 1
        or any(p is not None and p.shape != weight.shape for p in module.parameters())
    ):
        return None
    x, w = normal_like(weight, 4, weight.numel()).split((3, 1))
    try:
        zero, one, got = (_with_weight(module, x, value) for value in (0.0, 1.0, w[0].detach()))
    except Exception:  # a norm over other dimensions than the last refuses the probe
        return None
    tolerance = 8 * torch.finfo(weight.dtype).eps
    want = zero + (one - zero) * w
    if got.shape != x.shape or not torch.allclose(got, want, rtol=tolerance, atol=tolerance):
        return None
    return ELEMENTWISE if bool(zero.any()) else SCALING
