"""The head where several ranks share its vocabulary: each has the rows of weight [v, H] of its shard, and all tokens.

Layer: rows [N, H] x [v, H] -> tokens [N]. One gather of all rows' states in the forward, one all-reduce of d hidden, whose
parts the shards add up to, in the backward. Ops with the collectives between them, so that torch.compile traces both: how many
chunks or how much memory a rank takes is inside an op, and may differ. The rows' rules are in `rows/vocabulary_shards.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.checks import is_dtensor
from vcpo_kernels.core.dtypes import needs_grad, no_autocast, wide
from vcpo_kernels.core.library import define_op
from vcpo_kernels.head.accumulate import HeadGradients, fake_gradients
from vcpo_kernels.head.chunks import row_chunks
from vcpo_kernels.head.kept_scores import fake_kept_rows, gradients_of, score_matrix, takes_fast
from vcpo_kernels.head.operands import NEEDS, OPERANDS, Head, HeadInputs, Needs, scattered
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.shards import VocabularyShard, is_sharded_in, width_of
from vcpo_kernels.rows import views
from vcpo_kernels.rows import vocabulary_shards as rows_of_shards
from vcpo_kernels.rows.shard_states import NUMBERS
from vcpo_kernels.rows.statistics import RETURNS, SETTINGS, RowStatistics


def taken_apart(
    hidden: Any, weight: Any, bias: Any, vocabulary: VocabularyShard | None
) -> tuple[Any, Any, Any, VocabularyShard | None, bool]:
    """This rank's parts of DTensors that tensor parallelism made, the shard, and whether d hidden is still to be summed.

    A weight sharded by its rows, beside a DTensor hidden of the same mesh or with `vocabulary` given; anything else stays as
    it is. A hidden that is sharded by tokens (sequence parallelism) is gathered, its gradient scattered.
    """
    given = hidden
    if not is_sharded_in(weight, 0) or weight.device_mesh.ndim != 1:
        return hidden, weight, bias, vocabulary, True
    of_mesh = is_dtensor(hidden) and hidden.device_mesh == weight.device_mesh
    if not of_mesh and vocabulary is None:
        return hidden, weight, bias, vocabulary, True
    if of_mesh:
        from torch.distributed.tensor import Partial, Replicate

        whole = given.redistribute(weight.device_mesh, [Replicate()])
        hidden = whole.to_local(grad_placements=[Partial()])
    weight, vocabulary = rows_of_shards.local_shard(weight, 0, vocabulary)
    bias, _ = rows_of_shards.local_shard(bias, 0, vocabulary)
    return hidden, weight, bias, vocabulary, not of_mesh


def statistics_of_shard(
    inputs: HeadInputs, shard: VocabularyShard, sums_hidden: bool, memory: str, chunk_bytes: int, fast_bytes: int | None
) -> RowStatistics:
    """As token_stats of the logits would give them, the same on all ranks; differentiable through logp and entropy."""
    needs = Needs(*needs_grad(inputs.hidden, inputs.weight, inputs.bias))
    if needs.hidden and not needs.parameters:  # S is needed for one product alone
        memory, fast_bytes = "auto", chunk_bytes
    if needs.hidden and sums_hidden:
        inputs = inputs._replace(hidden=collectives.copied(inputs.hidden, shard.group))
    statistics, target_logit, entries, kept = forward(inputs, shard, needs, memory, chunk_bytes, fast_bytes)
    *operands, temperature, softcap, shift = inputs
    logp, entropy = _attach(
        *operands, statistics.logp, statistics.entropy, statistics.lse, target_logit, entries, kept, temperature, softcap,
        shift, chunk_bytes, *needs, shard.start, shard.size,
    )  # fmt: skip
    return statistics._replace(logp=logp, entropy=entropy)


def forward(
    inputs: HeadInputs, shard: VocabularyShard, needs: Needs, memory: str, chunk_bytes: int, fast_bytes: int | None
) -> tuple[RowStatistics, Tensor, Tensor, Tensor]:
    """Statistics and the sampled token's logit in the shape of token_ids, without gradient; the positions of the computed
    rows, and what is kept of them.
    """
    *operands, temperature, softcap, shift = inputs
    settings, place = (temperature, softcap, shift), (shard.start, shard.size)
    hidden, weight, bias, token_ids, mask = (t if t is None else t.detach() for t in operands)
    states, entries, kept = _states_op(
        hidden, weight, bias, token_ids, mask, *settings, memory, chunk_bytes, fast_bytes, *needs, *place
    )  # fmt: skip
    every = collectives.gathered(states, shard.group)
    *statistics, target_logit, product = _merge_op_(
        kept, weight, token_ids, mask, entries, every, *settings, *needs, *place
    )
    return RowStatistics(*statistics), target_logit, entries, kept if needs.parameters else product


# --- the states of a shard's rows ------------------------------------------------------------------------------------


def part_of(inputs: HeadInputs, start: int, size: int) -> HeadInputs:
    """Without the entries that are padding, ids counted from the shard's first."""
    width = width_of(len(inputs.weight), start, size)
    bias = None if inputs.bias is None else inputs.bias[:width]
    return inputs._replace(weight=inputs.weight[:width], bias=bias, token_ids=inputs.token_ids - start)


def _states_of_head(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = HeadInputs(*arguments[:8])
    memory, chunk_bytes, fast_bytes, *wanted, start, size = arguments[8:]
    views.check_ids("linear_token_stats", inputs.token_ids, inputs.mask, size, inputs.shift)
    part = part_of(inputs, start, size)
    positions = part.computed_positions()
    head = part.gathered(positions)
    with no_autocast(inputs.hidden):
        keeps = any(wanted) and takes_fast(head, memory, chunk_bytes, fast_bytes)
        logits = score_matrix(head, memory) if keeps else None
        states = _states(head, logits, chunk_bytes)
    kept = head.hidden.new_empty(0, head.vocabulary) if logits is None else logits
    return states, part.every_position() if positions is None else positions, kept


def _states(head: Head, kept: Tensor | None, chunk_bytes: int) -> Tensor:
    """[5, M]; the logits are left in `kept` where that is given."""
    if head.vocabulary == 0 or head.rows == 0:
        return rows_of_shards.empty_states(head.token_ids, head.hidden)
    if kept is not None:
        return _states_of(head, slice(0, head.rows), head.logits(kept))
    return torch.cat([_states_of(head, rows, logits) for rows, logits in row_chunks(head, chunk_bytes)], 1)


def _states_of(head: Head, rows: slice, logits: Tensor) -> Tensor:
    mask = None if head.mask is None else head.mask[None, rows]
    backend = registry.select("token_states", logits.device, logits.dtype, logits.shape[-1])
    states: Tensor = backend.forward(logits[None], head.token_ids[None, rows], mask, **head.settings)
    return states[:, 0]


def _fake_states(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = HeadInputs(*arguments[:8])
    memory, _, _, *wanted, start, size = arguments[8:]
    rows = inputs.fake_rows()
    kept = inputs.hidden.new_empty(
        fake_kept_rows(rows, memory if any(wanted) else "lean"), width_of(len(inputs.weight), start, size)
    )
    states = torch.empty((NUMBERS, rows), dtype=wide(inputs.hidden.dtype), device=inputs.hidden.device)
    return states, inputs.token_ids.new_empty(rows), kept


# --- statistics, and scores in the place of the logits ---------------------------------------------------------------


def _merge_(
    logits: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor | None, entries: Tensor, states: Tensor,
    temperature: float, softcap: float | None, shift: bool, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What is kept of the logits becomes S; product: S W, where nothing but hidden needs a gradient."""
    needs, (start, size) = Needs(*rest[:3]), rest[3:]
    ids, valid = token_ids.flatten()[entries], None if mask is None else mask.flatten()[entries]
    settings = (temperature, softcap, False)
    merged = rows_of_shards.merged_statistics(states, ids, valid, *settings, size)
    product = logits.new_empty(0, weight.shape[1])
    if len(logits):
        rows_of_shards.write_scores(logits, ids, valid, merged, settings, start, size)
        if needs.hidden and not needs.parameters:
            with no_autocast(logits):
                product = logits @ weight[: logits.shape[1]]
    outputs = (*RowStatistics(*merged[: len(RowStatistics._fields)]), merged.target_logit)
    return (*(scattered(s, entries, token_ids.shape) for s in outputs), product)


def _fake_merge_(
    logits: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor | None, entries: Tensor, states: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs = Needs(*rest[3:6])
    rows = logits.shape[0] if needs.hidden and not needs.parameters else 0
    outputs = (states.new_empty(token_ids.shape) for _ in (*RowStatistics._fields, "target_logit"))
    return (*outputs, logits.new_empty(rows, weight.shape[1]))


# --- gradients -------------------------------------------------------------------------------------------------------


def _attached(*arguments: Any) -> tuple[Tensor, Tensor]:
    logp, entropy = arguments[5:7]
    return logp.clone(), entropy.clone()


def _fake_attached(*arguments: Any) -> tuple[Tensor, Tensor]:
    logp, entropy = arguments[5:7]
    return torch.empty_like(logp), torch.empty_like(entropy)


def _shard_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    logp, entropy, lse, target_logit, entries, kept, grad_logp, grad_entropy = arguments[5:13]
    chunk_bytes, *wanted, start, size = arguments[16:]
    inputs, needs = HeadInputs(*arguments[:5], *arguments[13:16]), Needs(*wanted)
    saved = (logp, entropy, lse, target_logit)
    part = part_of(inputs, start, size)
    d = gradients_of(part, saved, entries, kept, grad_logp, grad_entropy, chunk_bytes, needs)
    padding = len(inputs.weight) - len(part.weight)
    if padding == 0:
        return d
    padded = (
        torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) if needed else x
        for x, needed in zip(d[1:], needs[1:], strict=True)
    )
    return HeadGradients(d.hidden, *padded)


def _fake_gradients(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, Needs(*rest[-5:-2]))


_SAVED_TENSORS = 11  # operands, statistics, entries, kept


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_SAVED_TENSORS])
    ctx.settings = inputs[_SAVED_TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (_SAVED_TENSORS - 3 + len(ctx.settings))
    if grad_logp is None and grad_entropy is None:
        return (None, None, None, *nothing)
    d = _backward_op(*ctx.saved_tensors, grad_logp, grad_entropy, *ctx.settings)
    needs = ctx.settings[-5:-2]
    return (*(grad if needed else None for grad, needed in zip(d, needs, strict=True)), *nothing)


_PLACE = "int start, int size"
_SAVED = "Tensor logp, Tensor entropy, Tensor lse, Tensor target_logit, Tensor entries, Tensor kept"
_states_op = define_op(
    f"linear_token_states({OPERANDS}, {SETTINGS}, str memory, int chunk_bytes, int? fast_bytes, {NEEDS}, {_PLACE})"
    # entries: positions, flat indices into token_ids, of the rows that were computed. kept: their logits [M, v], or no row
    " -> (Tensor states, Tensor entries, Tensor kept)",
    _states_of_head, _fake_states,
)  # fmt: skip
_merge_op_ = define_op(
    "linear_merged_statistics_(Tensor(a!) logits, Tensor weight, Tensor token_ids, Tensor? mask, Tensor entries, Tensor states,"
    f" {SETTINGS}, {NEEDS}, {_PLACE}) -> ({RETURNS}, Tensor target_logit, Tensor product)",
    _merge_, _fake_merge_,
)  # fmt: skip
_attach = define_op(
    f"sharded_linear_token_stats({OPERANDS}, {_SAVED}, {SETTINGS}, int chunk_bytes, {NEEDS}, {_PLACE})"
    " -> (Tensor logp, Tensor entropy)",
    _attached, _fake_attached, _setup_context, _backward,
)  # fmt: skip
_backward_op = define_op(
    f"sharded_linear_token_stats_backward({OPERANDS}, {_SAVED}, Tensor? grad_logp, Tensor? grad_entropy, {SETTINGS},"
    f" int chunk_bytes, {NEEDS}, {_PLACE}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _shard_gradients, _fake_gradients,
)  # fmt: skip
