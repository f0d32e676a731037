"""weighted_logp: sum_t c_t logp_t for coefficients known beforehand, with the gradient taken in the same pass.

Layer: rows [N, V] -> scalar. The op `vcpo_kernels::weighted_logp`, its in-place twin, their fakes and autograd, and the
public function. The kernel is score_rows in `backends/<name>/score_rows.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks, registry
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.library import LIBRARY, qualified
from vcpo_kernels.head import arguments as _head_inputs
from vcpo_kernels.rows import known_gradient as _scale
from vcpo_kernels.rows import views as _rows
from vcpo_kernels.rows.token_stats import TokenStats, checked


def weighted_logp(
    logits: Tensor,
    token_ids: Tensor,
    coefficients: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, TokenStats]:
    """sum_t c_t logp_t and the statistics of `token_stats`, with the gradient taken in the same pass over the logits.

    For the second of two phases: a first pass without gradients took the statistics of a whole window, `vcpo_loss` (or
    any loss) made one coefficient per token of them, so that nothing has to wait for the backward. One read and one
    write of [N, V] in all, where `token_stats` takes two reads and one write. The coefficients of `vcpo_loss` [B] become
    token-sized by `segments.spread(-out.coefficients)`; see `linear_weighted_logp` for an example with a head.

    Args:
        logits, token_ids, mask, temperature, softcap, shift: as in `token_stats`.
        coefficients: c, in the shape of token_ids, floating point. Entries of exactly 0 take no part (0 times a logp of
            -inf is 0), nor do those outside the mask. Differentiable: d loss / d c_t = logp_t.
        inplace: write the gradient over the logits instead of allocating [.., V] again; their values are gone after the
            call. As `inplace_backward` of `token_stats`, it needs logits that a module computed, and is ignored
            under torch.compile.

    Returns:
        loss, 0-d fp32 (float64 for float64 logits), differentiable to logits and coefficients, and TokenStats, which
        carry no gradient here. An upstream gradient of 1 (`loss.backward()`) costs nothing more, any other one pass.

    Raises:
        TypeError, ValueError: as `token_stats`.

    >>> import torch, vcpo_kernels as vk
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss, stats = vk.weighted_logp(logits, torch.tensor([0, 3]), torch.tensor([1.0, -2.0]))
    >>> loss.detach(), stats.entropy
    (tensor(1.3863), tensor([1.3863, 1.3863]))
    >>> loss.backward()
    >>> logits.grad[1]
    tensor([ 0.5000,  0.5000,  0.5000, -1.5000])
    """
    check = Check("weighted_logp")
    token_ids, mask, temperature, softcap = checked(check, logits, token_ids, mask, temperature, softcap, shift)
    coefficients = checked_coefficients(check, coefficients, token_ids, logits)
    if inplace:
        check.not_a_leaf("inplace", logits)
    rows_fit = torch.compiler.is_compiling() or _rows.as_rows(logits, shift) is not None
    if not rows_fit:  # more than two batch dimensions that no stride can merge: one call per slice of the first
        masks = mask if mask is not None else [None] * len(logits)
        parts = [
            weighted_logp(z, ids, c, m, temperature, softcap, shift, inplace)
            for z, ids, c, m in zip(logits, token_ids, coefficients, masks, strict=True)
        ]
        losses, stats = zip(*parts, strict=True)
        return torch.stack(losses).sum(), TokenStats.stacked(stats)
    (needs_logits,) = _head_inputs.needs_grad(logits)
    settings = (token_ids, mask, coefficients, temperature, softcap, shift)
    if inplace and needs_logits and not torch.compiler.is_compiling():
        outputs = _InPlace.apply(logits, *settings)
    else:
        outputs = torch.ops.vcpo_kernels.weighted_logp(logits, *settings, needs_logits)[:5]
    loss, *statistics = outputs
    return loss, TokenStats.detached(statistics, shift)


def checked_coefficients(check: Check, coefficients: Any, token_ids: Tensor, beside: Tensor) -> Tensor:
    """Coefficients as fp32 (float64 beside float64) in the shape of token_ids."""
    fix = "A vcpo_loss's coefficients are one per sequence: segments.spread(-out.coefficients)."
    check.tensor("coefficients", coefficients, checks.FLOAT_DTYPES, fix)
    check.shape("coefficients", coefficients, token_ids.shape, "token_ids.shape", fix)
    check.same_device("coefficients", coefficients, "token_ids", token_ids)
    return coefficients.to(torch.float64 if beside.dtype == torch.float64 else torch.float32)


def weighted_sum(logp: Tensor, coefficients: Tensor, live: Tensor | None) -> Tensor:
    """sum_t c_t logp_t over live tokens, where c_t = 0 takes no part whatever logp_t is."""
    idle = coefficients == 0
    if live is not None:
        idle |= ~live
    return torch.where(idle, 0.0, coefficients * logp).sum()


# --- the ops ---------------------------------------------------------------------------------------------------------

_ARGUMENTS = "Tensor token_ids, Tensor? mask, Tensor coefficients, float temperature, float? softcap, bool shift"
_RETURNS = "Tensor loss, Tensor logp, Tensor entropy, Tensor score_sqnorm, Tensor lse"
LIBRARY.define(
    f"weighted_logp(Tensor logits, {_ARGUMENTS}, bool needs_logits) -> ({_RETURNS}, Tensor gradient)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(f"weighted_logp_(Tensor(a!) logits, {_ARGUMENTS}) -> ({_RETURNS})", tags=(torch.Tag.pt2_compliant_tag,))


def _into(
    out: Tensor | None, logits: Tensor, token_ids: Tensor, mask: Tensor | None, coefficients: Tensor,
    temperature: float, softcap: float | None, shift: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """loss and statistics; the gradient into `out`, which may be `logits`."""
    rows = _rows.rows_of(logits, shift)
    ids, live, c = _rows.beside(token_ids, rows), _rows.beside(mask, rows), _rows.beside(coefficients, rows)
    _rows.check_ids(Check("weighted_logp"), ids, live, logits.shape[-1], shift)
    settings = {"temperature": temperature, "softcap": softcap, "shift": shift}
    if out is None:
        backend = registry.select("token_stats", logits.device, logits.dtype, logits.shape[-1])
        stats = backend.forward(rows, ids, live, **settings)
    else:
        out_rows = rows if out is logits else out.view(rows.shape)
        backend = registry.select("score_rows", logits.device, logits.dtype, logits.shape[-1])
        stats = backend.forward(out_rows, rows, ids, live, c, **settings)
    return (weighted_sum(stats[0], c, _rows.counts(ids, live, shift)), *(s.view(token_ids.shape) for s in stats))


def _weighted_logp(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, needs_logits = rest
    gradient = torch.empty(logits.shape if needs_logits else (0,), dtype=logits.dtype, device=logits.device)
    return (*_into(gradient if needs_logits else None, logits, *arguments), gradient)


def _weighted_logp_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    outputs = _into(logits, logits, *arguments)
    torch.autograd.graph.increment_version(logits)  # kernels write by address, which autograd does not see
    return outputs


def _fake_(logits: Tensor, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stats = _head_inputs.fake_statistics(logits, token_ids, 4)
    return (stats[0].new_empty(()), *stats)


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (
        *_fake_(logits, *rest),
        torch.empty(logits.shape if rest[-1] else (0,), dtype=logits.dtype, device=logits.device),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs_logits = inputs[-1]
    ctx.save_for_backward(output[1])
    _scale.hold(ctx, output[-1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 8
    (logp,) = ctx.saved_tensors
    (gradient,) = _scale.hand_out(ctx, grad_loss)
    grad_coefficients = grad_loss * logp if ctx.needs_input_grad[3] else None
    return (gradient if ctx.needs_logits else None, None, None, grad_coefficients, None, None, None, None)


class _InPlace(torch.autograd.Function):
    """weighted_logp_ with its gradient, which is the logits' own memory: torch.library has no autograd for such ops."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        written = logits.detach()  # shares storage and version counter
        loss, *stats = torch.ops.vcpo_kernels.weighted_logp_(written, *arguments)
        ctx.save_for_backward(stats[0])
        _scale.hold(ctx, written)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return (loss, *stats)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad_loss is None:
            return (None,) * 7
        (logp,) = ctx.saved_tensors
        (gradient,) = _scale.hand_out(ctx, grad_loss)
        grad_coefficients = grad_loss * logp if ctx.needs_input_grad[3] else None
        return (gradient, None, None, grad_coefficients, None, None, None)


for _name, _implementation, _fake_of in (
    ("weighted_logp", _weighted_logp, _fake),
    ("weighted_logp_", _weighted_logp_, _fake_),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified(_name), _fake_of, lib=LIBRARY)
torch.library.register_autograd(qualified("weighted_logp"), _autograd, setup_context=_setup_context, lib=LIBRARY)
