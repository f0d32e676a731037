"""weighted_logp: sum_t c_t logp_t for coefficients known beforehand, with the gradient taken in the same pass.

Layer: rows [N, V] -> scalar. The op `vcpo_kernels::weighted_logp`, its in-place twin, their fakes and autograd, and the
public function. The kernel is score_rows in `backends/<name>/score_rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks, registry
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import needs_grad, wide
from vcpo_kernels.core.library import define_op, first_derivative_only
from vcpo_kernels.parallel.shards import VocabularyShard
from vcpo_kernels.rows import known_gradient, views
from vcpo_kernels.rows.statistics import RETURNS, SETTINGS, RowStatistics
from vcpo_kernels.rows.token_stats import TokenStats, checked
from vcpo_kernels.rows.vocabulary_shards import checked_shard, statistics_of_shard

LARGEST_ENTRY = (
    2.0**10
)  # of an fp16 gradient before its factor is known: far from 65504, and p_v down to 1e-7 keep digits


def weighted_logp(
    logits: Tensor,
    token_ids: Tensor,
    coefficients: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: bool = False,
    inplace: bool = False,
    vocabulary: VocabularyShard | None = None,
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
        vocabulary: the logits are this rank's shard, as in `token_stats`. The gradient then takes its own pass, in the
            backward: two reads and one write, and so `inplace` writes there.

    Returns:
        loss, 0-d fp32 (float64 for float64 logits), differentiable to logits and coefficients, and TokenStats, which
        carry no gradient here. An upstream gradient of 1 (`loss.backward()`) costs nothing more, any other one pass; so does
        fp16, whose gradient is kept in range until the factor (a loss scale) is known.

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
    logits, shard = checked_shard(check, logits, vocabulary, "inplace" if inplace else None)
    token_ids, mask, temperature, softcap = checked(
        check, logits, token_ids, mask, temperature, softcap, shift, least_width=1 if shard is None else 0
    )
    coefficients = checked_coefficients(check, coefficients, token_ids, logits)
    if inplace:
        check.overwritable("inplace", logits)
    if shard is not None:
        of_shard = statistics_of_shard(logits, token_ids, mask, temperature, softcap, shift, inplace, shard)
        return known_sum(of_shard, coefficients, shift, mask)
    if not views.viewable(logits, shift):  # more than two batch dimensions that no stride can merge: one call per slice
        masks = mask if mask is not None else [None] * len(logits)
        parts = [
            weighted_logp(z, ids, c, m, temperature, softcap, shift, inplace)
            for z, ids, c, m in zip(logits, token_ids, coefficients, masks, strict=True)
        ]
        losses, stats = zip(*parts, strict=True)
        return torch.stack(losses).sum(), TokenStats.stacked(stats)
    (needs_logits,) = needs_grad(logits)
    settings = (token_ids, mask, coefficients, temperature, softcap, shift)
    if inplace and needs_logits and not torch.compiler.is_compiling():
        loss, *stats = _InPlace.apply(logits, *settings)
    else:
        loss, *stats, _ = _op(logits, *settings, needs_logits)
    return loss, without_gradient(stats, shift, mask)


def known_sum(
    statistics: RowStatistics, coefficients: Tensor, shift: bool, mask: Tensor | None
) -> tuple[Tensor, TokenStats]:
    """sum_t c_t logp_t of statistics that carry their gradient, and the statistics without it."""
    loss = _sum_op(statistics.logp, coefficients, views.valid_tokens(coefficients, mask, shift))
    return loss, without_gradient(statistics, shift, mask)


def without_gradient(statistics: Sequence[Tensor], shift: bool, mask: Tensor | None) -> TokenStats:
    """The statistics beside a loss whose gradient has been taken already."""
    return TokenStats.of(RowStatistics(*statistics).map(Tensor.detach), shift, mask)


def checked_coefficients(check: Check, coefficients: Any, token_ids: Tensor, beside: Tensor) -> Tensor:
    """Coefficients as fp32 (float64 beside float64) in the shape of token_ids."""
    fix = "A vcpo_loss's coefficients are one per sequence: segments.spread(-out.coefficients)."
    check.tensor("coefficients", coefficients, checks.FLOAT_DTYPES, fix)
    check.shape("coefficients", coefficients, token_ids.shape, "token_ids.shape", fix)
    check.same_device("coefficients", coefficients, "token_ids", token_ids)
    return coefficients.to(wide(beside.dtype))


def weighted_sum(logp: Tensor, coefficients: Tensor, valid: Tensor | None) -> Tensor:
    """sum_t c_t logp_t over valid tokens, where c_t = 0 takes no part whatever logp_t is."""
    return torch.where(_idle(coefficients, valid), 0.0, coefficients * logp).sum()


def _idle(coefficients: Tensor, valid: Tensor | None) -> Tensor:
    return coefficients == 0 if valid is None else (coefficients == 0) | ~valid


# --- the ops ---------------------------------------------------------------------------------------------------------


def _into(
    out: Tensor | None, logits: Tensor, token_ids: Tensor, mask: Tensor | None, coefficients: Tensor,
    temperature: float, softcap: float | None, shift: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """loss and statistics; the gradient into `out`, which may be `logits`."""
    rows = views.rows_of(logits, shift)
    ids, c = views.beside(token_ids, rows), views.beside(coefficients, rows)
    valid = views.beside(mask, rows)
    views.check_ids("weighted_logp", ids, valid, logits.shape[-1], shift)
    settings = {"temperature": temperature, "softcap": softcap, "shift": shift}
    if out is None:
        backend = registry.select("token_stats", logits.device, logits.dtype, logits.shape[-1])
        stats = RowStatistics(*backend.forward(rows, ids, valid, **settings))
    else:
        out_rows = rows if out is logits else out.view(rows.shape)
        times = _range_factor(logits, mask, coefficients, temperature)
        scored = c if times is None else c * times
        backend = registry.select("score_rows", logits.device, logits.dtype, logits.shape[-1])
        stats = RowStatistics(*backend.forward(out_rows, rows, ids, valid, scored, **settings))
    loss = weighted_sum(stats.logp, c, views.valid_tokens(ids, valid, shift))
    return (loss, *(s.view(token_ids.shape) for s in stats))


def _range_factor(logits: Tensor, mask: Tensor | None, coefficients: Tensor, temperature: float) -> Tensor | None:
    """What the gradient is taken times: an entry of a row is at most its |c| / temperature."""
    if logits.dtype != torch.float16 or coefficients.numel() == 0:
        return None
    largest = known_gradient.magnitudes(coefficients, mask).amax() / temperature
    return known_gradient.range_factor(logits.dtype, largest, LARGEST_ENTRY)


def _weighted_logp(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, needs_logits = rest
    gradient = torch.empty(logits.shape if needs_logits else (0,), dtype=logits.dtype, device=logits.device)
    return (*_into(gradient if needs_logits else None, logits, *arguments), gradient)


def _weighted_logp_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    outputs = _into(logits, logits, *arguments)
    torch.autograd.graph.increment_version(logits)  # kernels write by address, which autograd does not see
    return outputs


def _fake_(logits: Tensor, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stats = RowStatistics.empty(token_ids.shape, logits)
    return (stats.logp.new_empty(()), *stats)


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (
        *_fake_(logits, *rest),
        torch.empty(logits.shape if rest[-1] else (0,), dtype=logits.dtype, device=logits.device),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, mask, coefficients, temperature, *_, ctx.needs_logits = inputs
    _, logp, *_, gradient = output
    ctx.save_for_backward(logp)
    known_gradient.save(ctx, _range_factor(logits, mask, coefficients, temperature), gradient)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 8
    (logp,) = ctx.saved_tensors
    (gradient,) = known_gradient.release(ctx, grad_loss)
    grad_coefficients = grad_loss * logp if ctx.needs_input_grad[3] else None
    return (gradient if ctx.needs_logits else None, None, None, grad_coefficients, None, None, None, None)


_remember, _once = first_derivative_only("weighted_logp", _setup_context, _backward)


class _InPlace(torch.autograd.Function):
    """weighted_logp_ with its gradient, which is the logits' own memory: torch.library has no autograd for such ops."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        written = logits.detach()  # shares storage and version counter
        loss, *stats = _op_(written, *arguments)
        _remember(ctx, (logits, *arguments, True), (loss, *stats, written))
        ctx.mark_non_differentiable(*stats)
        return (loss, *stats)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        return _once(ctx, grad_loss)[:-1]  # without needs_logits, which only the other op is told


def _save_terms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _terms_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    logp, coefficients, valid = ctx.saved_tensors
    to_logp = torch.where(_idle(coefficients, valid), 0.0, grad * coefficients)
    return to_logp, grad * (logp if valid is None else torch.where(valid, logp, 0.0)), None


_sum_op = define_op(
    "weighted_sum(Tensor logp, Tensor coefficients, Tensor? valid) -> Tensor",
    weighted_sum, lambda logp, *rest: logp.new_empty(()), _save_terms, _terms_gradients,
)  # fmt: skip
_ARGUMENTS = f"Tensor token_ids, Tensor? mask, Tensor coefficients, {SETTINGS}"
_op = define_op(
    f"weighted_logp(Tensor logits, {_ARGUMENTS}, bool needs_logits) -> (Tensor loss, {RETURNS}, Tensor gradient)",
    _weighted_logp, _fake, _setup_context, _backward,
)  # fmt: skip
_op_ = define_op(
    f"weighted_logp_(Tensor(a!) logits, {_ARGUMENTS}) -> (Tensor loss, {RETURNS})", _weighted_logp_, _fake_
)
