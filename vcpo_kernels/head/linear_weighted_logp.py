"""linear_weighted_logp: weighted_logp of hidden states and a head's weight, in O(chunk) memory and three GEMMs.

Layer: rows [N, H] x [V, H] -> scalar. The op `vcpo_kernels::linear_weighted_logp`, its fake and autograd, and the public
function. Since the coefficients are known, each chunk of logits gives statistics and gradients and is done with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import needs_grad, no_autocast
from vcpo_kernels.core.library import define_op
from vcpo_kernels.head import deferred
from vcpo_kernels.head.accumulate import HeadGradients, Sum, fake_gradients
from vcpo_kernels.head.arguments import checked
from vcpo_kernels.head.chunks import CHUNK_BYTES, rows_per_chunk
from vcpo_kernels.head.operands import NEEDS, Head, HeadInputs, Needs, at_positions
from vcpo_kernels.head.score_matrix import HeadStatistics, score_chunks, statistics_of
from vcpo_kernels.head.summed_hidden import check_sum
from vcpo_kernels.head.vocabulary_shards import statistics_of_shard, taken_apart
from vcpo_kernels.parallel.shards import VocabularyShard
from vcpo_kernels.rows import known_gradient
from vcpo_kernels.rows.statistics import RETURNS, SETTINGS, RowStatistics
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.rows.vocabulary_shards import check_shard
from vcpo_kernels.rows.weighted_logp import checked_coefficients, known_sum, weighted_sum, without_gradient

LARGEST_SUM = (
    2.0**14
)  # of an fp16 gradient before its factor is known: what is summed is bounded, and its small terms keep digits


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
    chunk_bytes: int = CHUNK_BYTES,
    vocabulary: VocabularyShard | None = None,
    sum_hidden: bool = True,
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
        vocabulary, sum_hidden: weight and bias are this rank's shard, as in `linear_token_stats`, with its collectives. The
            gradient is then formed in the backward: from the scores where all rows fit one chunk, else computed again, 4 GEMMs.

    Returns:
        loss, 0-d fp32 (float64 for float64), differentiable to hidden, weight, bias and coefficients, and TokenStats,
        which carry no gradient. An upstream gradient of 1 costs nothing more; any other one a pass over the gradients.

    Raises:
        TypeError, ValueError: as `linear_token_stats`.
    """
    check = Check("linear_weighted_logp")
    chunk_bytes = check.integer("chunk_bytes", chunk_bytes, 1)
    deferred.refuse(check, "linear_token_stats, and accumulate_ with the coefficients", weight, bias)
    shard = check_shard(check, vocabulary)
    check_sum(check, hidden, sum_hidden, shard)
    hidden, weight, bias, shard, sums_hidden = taken_apart(hidden, weight, bias, shard)
    sums_hidden = sums_hidden and sum_hidden
    inputs = checked(check, hidden, weight, token_ids, bias, mask, temperature, softcap, shift, shard)
    coefficients = checked_coefficients(check, coefficients, inputs.token_ids, inputs.hidden)
    if shard is not None:
        of_shard = statistics_of_shard(inputs, shard, sums_hidden, "auto", chunk_bytes, chunk_bytes)
        return known_sum(of_shard, coefficients, shift, inputs.mask)
    needs = needs_grad(inputs.hidden, inputs.weight, inputs.bias)
    *operands, temperature, softcap, shift = inputs
    loss, *outputs = _op(*operands, coefficients, temperature, softcap, shift, chunk_bytes, *needs)
    return loss, without_gradient(outputs[: len(RowStatistics._fields)], shift, inputs.mask)


# --- the op ----------------------------------------------------------------------------------------------------------


def _linear_weighted_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None, coefficients: Tensor,
    temperature: float, softcap: float | None, shift: bool, chunk_bytes: int, *wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = HeadInputs(hidden, weight, bias, token_ids, mask, temperature, softcap, shift)
    needs = Needs(*wanted)
    inputs.check_ids("linear_weighted_logp")
    positions = inputs.computed_positions()
    head, c = inputs.gathered(positions), at_positions(coefficients, positions)
    stats = HeadStatistics.empty(head, with_targets=False)
    with no_autocast(hidden):
        if not any(needs):
            statistics_of(head, chunk_bytes, stats)
            d = fake_gradients(hidden, weight, needs)
        else:
            times = _range_factor(hidden, weight, mask, coefficients, temperature)
            scored = c if times is None else c * times
            every = inputs.captured or bool((c != 0).all())
            d = (_in_one_pass if every else _without_zeros)(head, scored, chunk_bytes, needs, stats)
    if needs.hidden:
        d = d._replace(hidden=inputs.scattered_hidden(d.hidden, positions))
    loss = weighted_sum(stats.rows.logp, c, head.mask)
    return (loss, *(inputs.scattered(s, positions) for s in stats.rows), *d)


def _range_factor(
    hidden: Tensor, weight: Tensor, mask: Tensor | None, coefficients: Tensor, temperature: float
) -> Tensor | None:
    """What the gradients are taken times: no sum of theirs passes LARGEST_SUM, whatever the signs.

    d hidden_t is at most 2 |c_t| max|W|, d weight_v at most sum_t |c_t| max|hidden|, over the temperature.
    """
    if hidden.dtype != torch.float16 or coefficients.numel() == 0:
        return None
    c = known_gradient.magnitudes(coefficients, mask)
    by_token, by_entry = (x.detach().abs().amax().float().clamp(min=1) for x in (weight, hidden))
    bound = torch.maximum(2 * c.amax() * by_token, c.sum() * by_entry) / temperature
    return known_gradient.range_factor(hidden.dtype, bound, LARGEST_SUM)


def _without_zeros(head: Head, c: Tensor, chunk_bytes: int, needs: Needs, stats: HeadStatistics) -> HeadGradients:
    """The rows with a coefficient take three GEMMs, the others one."""
    idle, active = (c == 0).nonzero().squeeze(1), (c != 0).nonzero().squeeze(1)
    parts = [(index, head.selected(index)) for index in (idle, active)]
    of_idle, of_active = (HeadStatistics.empty(part, with_targets=False) for _, part in parts)
    statistics_of(parts[0][1], chunk_bytes, of_idle)
    d = _in_one_pass(parts[1][1], c[active], chunk_bytes, needs, of_active)
    for (index, _), of_part in zip(parts, (of_idle, of_active), strict=True):
        for whole, part in zip(stats.rows, of_part.rows, strict=True):
            whole[index] = part
    if needs.hidden:
        d = d._replace(hidden=head.hidden.new_zeros(head.hidden.shape).index_copy_(0, active, d.hidden))
    return d


def _in_one_pass(head: Head, c: Tensor, chunk_bytes: int, needs: Needs, stats: HeadStatistics) -> HeadGradients:
    """Statistics [M] into `stats`; the gradients, by chunks of rows."""
    hidden = head.hidden
    single = head.rows <= rows_per_chunk(head, chunk_bytes)
    grad_hidden = torch.empty_like(hidden) if needs.hidden else hidden.new_empty(0)
    grad_weight = Sum(head.vocabulary, hidden.shape[1], hidden, single) if needs.weight else None
    grad_bias = Sum(head.vocabulary, 1, hidden, single) if needs.bias else None
    for rows, scores in score_chunks(head, chunk_bytes, c, stats):
        if needs.hidden:
            torch.mm(scores, head.weight, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.add(scores.t(), hidden[rows])
        if grad_bias is not None:
            grad_bias.add(scores.t(), torch.ones_like(hidden[rows, :1]))
    return HeadGradients(
        grad_hidden,
        hidden.new_empty(0) if grad_weight is None else grad_weight.result(),
        hidden.new_empty(0) if grad_bias is None else grad_bias.result().squeeze(1),
    )


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stats = RowStatistics.empty(token_ids.shape, hidden)
    return (stats.logp.new_empty(()), *stats, *fake_gradients(hidden, weight, Needs(*rest[-3:])))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, _, mask, coefficients, temperature, *_ = inputs
    ctx.needs, ctx.arguments = inputs[-3:], len(inputs)
    _, logp, *_ = output
    ctx.save_for_backward(logp)
    known_gradient.save(ctx, _range_factor(hidden, weight, mask, coefficients, temperature), *output[-3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * ctx.arguments
    (logp,) = ctx.saved_tensors
    gradients = known_gradient.release(ctx, grad_loss)
    of_operands = (d if needed else None for d, needed in zip(gradients, ctx.needs, strict=True))
    grad_coefficients = grad_loss * logp if ctx.needs_input_grad[5] else None
    return (*of_operands, None, None, grad_coefficients, *(None,) * (ctx.arguments - 6))


_op = define_op(
    "linear_weighted_logp(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor coefficients,"
    f" {SETTINGS}, int chunk_bytes, {NEEDS})"
    f" -> (Tensor loss, {RETURNS}, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _linear_weighted_logp, _fake, _setup_context, _backward,
)  # fmt: skip
