"""linear_token_stats: token_stats of hidden states and a head's weight, without keeping the logits, or in their place.

Layer: rows [N, H] x [V, H] -> tokens [N]. The op `vcpo_kernels::linear_token_stats`, its backward, fakes, autograd, and
the public function. The GEMMs run around the row kernels of token_stats and score_rows in `backends/`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import needs_grad, no_autocast
from vcpo_kernels.core.library import define_op
from vcpo_kernels.head import deferred
from vcpo_kernels.head.accumulate import fake_gradients
from vcpo_kernels.head.arguments import checked
from vcpo_kernels.head.chunks import CHUNK_BYTES
from vcpo_kernels.head.kept_scores import fake_kept_rows, gradients_of, score_matrix, takes_fast
from vcpo_kernels.head.operands import NEEDS, OPERANDS, Head, HeadInputs, Needs
from vcpo_kernels.head.score_matrix import HeadStatistics, score_, score_chunks, statistics_of
from vcpo_kernels.head.summed_hidden import check_sum
from vcpo_kernels.head.vocabulary_shards import statistics_of_shard, taken_apart
from vcpo_kernels.parallel.shards import VocabularyShard
from vcpo_kernels.rows.statistics import RETURNS, SETTINGS, RowStatistics
from vcpo_kernels.rows.token_stats import TokenStats
from vcpo_kernels.rows.vocabulary_shards import check_shard

MEMORY = ("auto", "fast", "lean")


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: bool = False,
    memory: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
    fast_bytes: int | None = None,
    vocabulary: VocabularyShard | None = None,
    sum_hidden: bool = True,
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, token_ids, ...)`, without the logits in memory. Same statistics.

    Differentiable to hidden, weight and bias through logp and entropy. Rows that the mask leaves out are dropped before
    the first GEMM, rows without a gradient before the backward's.

    What is kept for the backward, by `memory`:

    - "lean": nothing. Chunks of logits pass through one buffer of at most `chunk_bytes`; the backward computes them
      again. 4 GEMMs of size N V H.
    - "fast": the score matrix S = d logp / d logits [N, V] in hidden's dtype, written over the logits by the pass
      that takes the statistics. d hidden = g (S W), d weight = S^T (g hidden): 3 GEMMs, no second pass over the
      vocabulary. A gradient through the entropy needs more than S and recomputes as "lean" does.
    - "auto": "fast" where S fits into `fast_bytes` and can be allocated, else "lean".

    Where neither weight nor bias needs a gradient (LoRA, a frozen head) all three are the same: S W [N, H] is formed
    chunk by chunk in the forward, 2 GEMMs, no [N, V].

    Args:
        hidden: [.., H], bfloat16, float16, float32 (or float64: reference backend), any strides.
        weight: [V, H], an nn.Linear's. Under autocast both are cast as F.linear casts; otherwise two dtypes meet in the
            one torch promotes them to, at the cost of a copy.
        token_ids, mask, temperature, softcap, shift: as in `token_stats`, with logits [.., V]; but temperature >= 1e-3 (unless
            in float64), since the rounding of a GEMM is divided by it.
        bias: [V] or None.
        memory: "auto", "fast" or "lean".
        chunk_bytes: size of the buffer for logits. Accumulators beside it, only where they do not fit one chunk:
            fp32 [N, H] in the backward. Gradients of the weight are accumulated in fp32 and rounded once.
        fast_bytes: what S may take under "auto". None: `chunk_bytes`, or half of the memory that this process may still
            take: of what is free on the device, within its cgroup's and its own limits.
        vocabulary: weight [v, H] and bias [v] are this rank's shard of a vocabulary that the ranks of a group share, as in
            `token_stats`; hidden and token_ids are whole and the same on all. One gather of 20 bytes a row forward, one
            all-reduce of d hidden backward. Recognised by itself where weight is a DTensor sharded by its rows and hidden a
            DTensor of the same mesh, replicated or sharded by tokens; all-gather and reduce-scatter are then DTensor's.
        sum_hidden: whether the shards' parts of d hidden are added up here. False: they are where hidden was gathered, by the
            backward of what gathered it (a reduce-scatter, as under Megatron's sequence parallelism). With `vocabulary` alone.
            Both sums, or neither, are an error where hidden is seen to come from Megatron's functions.

    Returns:
        TokenStats, each field in the shape of token_ids.

    Raises:
        TypeError, ValueError: naming the argument, what it got, what it wants; ids as in `token_stats`.
        torch.OutOfMemoryError: under "fast", where S cannot be allocated.

    >>> import torch, vcpo_kernels as vk
    >>> hidden, weight = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    >>> stats = vk.linear_token_stats(hidden, weight, torch.tensor([0, 1, 1]))
    >>> stats.logp.detach()
    tensor([-1.3863, -1.3863, -1.3863])
    >>> stats.logp.sum().backward()
    >>> weight.grad[:, 0]
    tensor([ 0.2500,  1.2500, -0.7500, -0.7500])
    """
    check = Check("linear_token_stats")
    check.choice("memory", memory, MEMORY)
    chunk_bytes = check.integer("chunk_bytes", chunk_bytes, 1)
    if fast_bytes is not None:
        fast_bytes = check.integer("fast_bytes", fast_bytes, 0)
    shard = check_shard(check, vocabulary)
    check_sum(check, hidden, sum_hidden, shard)
    parameters, deferral = (weight, bias), deferred.deferral_of(weight, bias)
    hidden, weight, bias, shard, sums_hidden = taken_apart(hidden, weight, bias, shard)
    sums_hidden = sums_hidden and sum_hidden
    inputs = checked(check, hidden, weight, token_ids, bias, mask, temperature, softcap, shift, shard)
    if deferral is not None:
        options = (shard, sums_hidden, memory, chunk_bytes, fast_bytes)
        outputs: tuple[Tensor, ...] = deferral.linear_token_stats(parameters, *inputs, *options)
    elif shard is not None:
        outputs = statistics_of_shard(inputs, shard, sums_hidden, memory, chunk_bytes, fast_bytes)
    else:
        needs = needs_grad(inputs.hidden, inputs.weight, inputs.bias)
        outputs = op(*inputs, memory, chunk_bytes, fast_bytes, *needs)
    return TokenStats.of(RowStatistics(*outputs[: len(RowStatistics._fields)]), shift, inputs.mask)


# --- forward ---------------------------------------------------------------------------------------------------------


def _linear_token_stats(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = HeadInputs(*arguments[:8])
    memory, chunk_bytes, fast_bytes, *wanted = arguments[8:]
    inputs.check_ids("linear_token_stats")
    positions = inputs.computed_positions()
    head = inputs.gathered(positions)
    stats = HeadStatistics.empty(head, with_targets=True)
    with no_autocast(inputs.hidden):
        kept = _forward(head, stats, Needs(*wanted), memory, chunk_bytes, fast_bytes)
    assert stats.target_logit is not None
    outputs = (inputs.scattered(s, positions) for s in (*stats.rows, stats.target_logit))
    return (*outputs, inputs.every_position() if positions is None else positions, kept)


def _forward(
    head: Head, stats: HeadStatistics, needs: Needs, memory: str, chunk_bytes: int, fast_bytes: int | None
) -> Tensor:
    """Statistics of all rows into `stats`; what is kept for the backward, a row for each row or none at all."""
    if needs.parameters and takes_fast(head, memory, chunk_bytes, fast_bytes):
        scores = score_matrix(head, memory)
        if scores is not None:
            # By one GEMM: libraries rearrange the weight once per call, which chunks would multiply.
            head.logits(scores)
            score_(head, scores, slice(0, head.rows), None, stats)
            return scores
    if needs.hidden and not needs.parameters:
        product = torch.empty_like(head.hidden)
        for rows, scores in score_chunks(head, chunk_bytes, None, stats):
            torch.mm(scores, head.weight, out=product[rows])
        return product
    statistics_of(head, chunk_bytes, stats)
    return head.hidden.new_empty(0, head.vocabulary)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, memory, needs = HeadInputs(*arguments[:8]), arguments[8], Needs(*arguments[11:])
    hidden, token_ids, vocabulary = inputs.hidden, inputs.token_ids, len(inputs.weight)
    stats = RowStatistics.empty(token_ids.shape, hidden)
    rows = inputs.fake_rows()
    if needs.parameters:
        kept = hidden.new_empty(fake_kept_rows(rows, memory), vocabulary)
    elif needs.hidden:
        kept = hidden.new_empty(rows, hidden.shape[-1])
    else:
        kept = hidden.new_empty(0, vocabulary)
    return (*stats, torch.empty_like(stats.lse), token_ids.new_empty(rows), kept)


# --- backward --------------------------------------------------------------------------------------------------------


def _linear_token_stats_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None,
    logp: Tensor, entropy: Tensor, lse: Tensor, target_logit: Tensor, positions: Tensor, kept: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, temperature: float, softcap: float | None, shift: bool,
    chunk_bytes: int, *wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = HeadInputs(hidden, weight, bias, token_ids, mask, temperature, softcap, shift)
    saved = (logp, entropy, lse, target_logit)
    return gradients_of(inputs, saved, positions, kept, grad_logp, grad_entropy, chunk_bytes, Needs(*wanted))


def _fake_backward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, Needs(*rest[-3:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.temperature, ctx.softcap, ctx.shift, _, ctx.chunk_bytes, _ = inputs[:11]
    ctx.needs = inputs[11:]
    *statistics, target_logit, positions, kept = output
    stats = RowStatistics(*statistics)
    ctx.save_for_backward(*operands, stats.logp, stats.entropy, stats.lse, target_logit, positions, kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    nothing = (None,) * 11
    if grad_logp is None and grad_entropy is None:
        return (None, None, None, *nothing)
    d = _backward_op(
        *ctx.saved_tensors,
        grad_logp,
        grad_entropy,
        ctx.temperature,
        ctx.softcap,
        ctx.shift,
        ctx.chunk_bytes,
        *ctx.needs,
    )
    return (*(grad if needed else None for grad, needed in zip(d, ctx.needs, strict=True)), *nothing)


# --- the ops ---------------------------------------------------------------------------------------------------------

op = define_op(
    f"linear_token_stats({OPERANDS}, {SETTINGS}, str memory, int chunk_bytes, int? fast_bytes, {NEEDS})"
    # target_logit: of the sampled token. entries: positions, flat indices into token_ids, of the rows that were computed.
    # kept: S [M, V] ("fast"), S W [M, H] (nothing but hidden needs a gradient), or no row
    f" -> ({RETURNS}, Tensor target_logit, Tensor entries, Tensor kept)",
    _linear_token_stats, _fake, _setup_context, _backward,
)  # fmt: skip
_SAVED = "Tensor logp, Tensor entropy, Tensor lse, Tensor target_logit, Tensor entries, Tensor kept"
_backward_op = define_op(
    f"linear_token_stats_backward({OPERANDS}, {_SAVED}, Tensor? grad_logp, Tensor? grad_entropy, {SETTINGS},"
    f" int chunk_bytes, {NEEDS}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _linear_token_stats_backward, _fake_backward,
)  # fmt: skip
