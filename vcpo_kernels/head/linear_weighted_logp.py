"""linear_weighted_logp: weighted_logp of hidden states and a head's weight, in O(chunk) memory and three GEMMs.

Layer: rows [N, H] x [V, H] -> scalar. The op `vcpo_kernels::linear_weighted_logp`, its fake and autograd, and the public
function. Since the coefficients are known, each chunk of logits gives statistics and gradients and is done with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.library import LIBRARY, qualified
from vcpo_kernels.head import arguments as _head_inputs
from vcpo_kernels.head import deferred as _deferred
from vcpo_kernels.head import operands as _head
from vcpo_kernels.head.operands import Head, Sum
from vcpo_kernels.rows import known_gradient as _scale
from vcpo_kernels.rows import views as _rows
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.rows.weighted_logp import checked_coefficients, weighted_sum


def linear_weighted_logp(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: bool = False,
    chunk_bytes: int = _head.CHUNK_BYTES,
) -> tuple[Tensor, TokenStats]:
    """`weighted_logp(hidden @ weight.T + bias, token_ids, coefficients, ...)`, without the logits in memory.

    loss = sum_t c_t logp_t, with the gradients of hidden, weight and bias taken in the same pass: 3 GEMMs of size N V H
    and one buffer of at most `chunk_bytes`. Rows outside the mask are dropped before the first GEMM, rows whose
    coefficient is exactly 0 before the other two.

    Two phases make any loss of sequence-level coefficients fit: statistics of the whole window without gradients, then
    micro-batches in any order, whose gradients add up to those of the whole window at once:

    >>> import torch, vcpo_kernels as vk
    >>> hidden, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    >>> ids, mask = torch.randint(0, 11, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
    >>> segments = vk.Segments.padded(mask)
    >>> with torch.no_grad():
    ...     stats = vk.linear_token_stats(hidden, weight, ids, mask=mask)
    >>> out = vk.vcpo_loss(stats, stats.logp, torch.tensor([1.0, 0.0, 0.5, 0.0]), 2, segments)
    >>> c = segments.spread(-out.coefficients)
    >>> for half in (slice(0, 2), slice(2, 4)):
    ...     loss, _ = vk.linear_weighted_logp(hidden[half], weight, ids[half], c[half], mask=mask[half])
    ...     loss.backward()

    Args:
        hidden, weight, token_ids, bias, mask, temperature, softcap, shift, chunk_bytes: as in `linear_token_stats`.
            Where the rows need several chunks, d weight is accumulated in an fp32 [V, H] beside the buffer.
        coefficients: c, in the shape of token_ids, as in `weighted_logp`.

    Returns:
        loss, 0-d fp32 (float64 for float64), differentiable to hidden, weight, bias and coefficients, and TokenStats,
        which carry no gradient. An upstream gradient of 1 costs nothing more; any other one a pass over the gradients.

    Raises:
        TypeError, ValueError: as `linear_token_stats`.
    """
    check = Check("linear_weighted_logp")
    chunk_bytes = check.integer("chunk_bytes", chunk_bytes, 1)
    _deferred.refuse(check, "linear_token_stats, and accumulate_ with the coefficients", weight, bias)
    hidden, weight, bias, token_ids, mask, temperature, softcap = _head_inputs.checked(
        check, hidden, weight, token_ids, bias, mask, temperature, softcap, shift
    )
    coefficients = checked_coefficients(check, coefficients, token_ids, hidden)
    loss, *statistics = torch.ops.vcpo_kernels.linear_weighted_logp(
        hidden, weight, bias, token_ids, mask, coefficients, temperature, softcap, shift, chunk_bytes,
        *_head_inputs.needs_grad(hidden, weight, bias),
    )[:5]  # fmt: skip
    return loss, TokenStats.detached(statistics, shift)


# --- the op ----------------------------------------------------------------------------------------------------------

LIBRARY.define(
    "linear_weighted_logp(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor coefficients,"
    " float temperature, float? softcap, bool shift, int chunk_bytes, bool needs_hidden, bool needs_weight, bool needs_bias)"
    " -> (Tensor loss, Tensor logp, Tensor entropy, Tensor score_sqnorm, Tensor lse,"
    " Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_ARGUMENTS = 13


def _linear_weighted_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None, coefficients: Tensor,
    temperature: float, softcap: float | None, shift: bool, chunk_bytes: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _rows.check_ids(Check("linear_weighted_logp"), token_ids, mask, len(weight), shift)
    entries = _head.live_entries(token_ids, mask, shift)
    head = _head.gathered(hidden, weight, bias, token_ids, mask, entries, temperature, softcap, shift)
    c = _head.live_values(coefficients, entries)
    needs = (needs_hidden, needs_weight, needs_bias)
    stats = _head.empty_statistics(head)
    with _head_inputs.no_autocast(hidden):
        if not any(needs):
            _head.statistics(head, chunk_bytes, stats)
            gradients = tuple(hidden.new_empty(0) for _ in needs)
        elif _head.capturing(hidden) or bool((c != 0).all()):
            gradients = _in_one_pass(head, c, chunk_bytes, needs, stats)
        else:
            gradients = _without_zeros(head, c, chunk_bytes, needs, stats)
    grad_hidden = _head.scattered_rows(gradients[0], entries, hidden, shift) if needs_hidden else gradients[0]
    outputs = [_head.scattered(s, entries, token_ids.shape) for s in stats]
    return (weighted_sum(stats[0], c, head.mask), *outputs, grad_hidden, *gradients[1:])


def _without_zeros(
    head: Head, c: Tensor, chunk_bytes: int, needs: tuple[bool, bool, bool], stats: list[Tensor]
) -> tuple[Tensor, ...]:
    """The rows with a coefficient take three GEMMs, the others one."""
    idle, active = (c == 0).nonzero().squeeze(1), (c != 0).nonzero().squeeze(1)
    parts = [(index, head.selected(index)) for index in (idle, active)]
    of_parts = [_head.empty_statistics(part) for _, part in parts]
    _head.statistics(parts[0][1], chunk_bytes, of_parts[0])
    grad_active, *rest = _in_one_pass(parts[1][1], c[active], chunk_bytes, needs, of_parts[1])
    for (index, _), of_part in zip(parts, of_parts, strict=True):
        for whole, part in zip(stats, of_part, strict=True):
            whole[index] = part
    if needs[0]:
        grad_active = head.hidden.new_zeros(head.hidden.shape).index_copy_(0, active, grad_active)
    return grad_active, *rest


def _in_one_pass(
    head: Head, c: Tensor, chunk_bytes: int, needs: tuple[bool, bool, bool], stats: list[Tensor]
) -> tuple[Tensor, ...]:
    """Statistics [M] into `stats`; gradients of hidden [M, H], weight and bias, those not needed empty."""
    hidden, needs_hidden, needs_weight, needs_bias = head.hidden, *needs
    single = head.rows <= _head.rows_per_chunk(head, chunk_bytes)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = Sum(head.vocabulary, hidden.shape[1], hidden, single) if needs_weight else None
    grad_bias = Sum(head.vocabulary, 1, hidden, single) if needs_bias else None
    for rows, logits in _head.chunks(head, chunk_bytes):
        _head.row_scores_(head, logits, rows, c, stats)
        if needs_hidden:
            torch.mm(logits, head.weight, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.add(logits.t(), hidden[rows])
        if grad_bias is not None:
            grad_bias.add(logits.t(), torch.ones_like(hidden[rows, :1]))
    return (
        grad_hidden,
        hidden.new_empty(0) if grad_weight is None else grad_weight.result(),
        hidden.new_empty(0) if grad_bias is None else grad_bias.result().squeeze(1),
    )


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stats = _head_inputs.fake_statistics(hidden, token_ids, 4)
    return (stats[0].new_empty(()), *stats, *_head_inputs.fake_gradients(hidden, weight, rest[-3:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-3:]
    ctx.save_for_backward(output[1])
    _scale.hold(ctx, *output[5:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * _ARGUMENTS
    (logp,) = ctx.saved_tensors
    gradients = _scale.hand_out(ctx, grad_loss)
    of_operands = (d if needed else None for d, needed in zip(gradients, ctx.needs, strict=True))
    grad_coefficients = grad_loss * logp if ctx.needs_input_grad[5] else None
    return (*of_operands, None, None, grad_coefficients, *(None,) * (_ARGUMENTS - 6))


LIBRARY.impl("linear_weighted_logp", _linear_weighted_logp, "CompositeExplicitAutograd")
torch.library.register_fake(qualified("linear_weighted_logp"), _fake, lib=LIBRARY)
torch.library.register_autograd(qualified("linear_weighted_logp"), _autograd, setup_context=_setup_context, lib=LIBRARY)
