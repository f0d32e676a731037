"""token_stats of rows whose vocabulary several ranks share: one gather of five numbers a token, nothing in the backward.

Layer: rows [N, v] -> tokens [N]. The ops `token_states` (a shard's part of each row), `merged_statistics` (of all shards) and
`sharded_token_stats` with its backward, by which the statistics enter autograd. The kernels are in
`backends/<name>/token_states.py` and, for the backward, `token_stats.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import checks, registry
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import wide
from vcpo_kernels.core.library import define_op, nothing_returned
from vcpo_kernels.parallel import collectives
from vcpo_kernels.parallel.shards import VocabularyShard, is_sharded_in, width_of
from vcpo_kernels.rows import views
from vcpo_kernels.rows.kept_logits import logits_are_kept
from vcpo_kernels.rows.shard_states import EMPTY, MERGED_RETURNS, NUMBERS, MergedStatistics
from vcpo_kernels.rows.statistics import SETTINGS, RowStatistics

# From where on neither lse nor logp, as one fp32 number, gives p its digits: kKept of csrc/common/row_gradient.h.
KEPT_DIGITS = 32.0


def check_shard(check: Check, vocabulary: Any) -> VocabularyShard | None:
    """Raise unless it is a VocabularyShard or None."""
    if vocabulary is not None and not isinstance(vocabulary, VocabularyShard):
        raise check.type_error(
            f"vocabulary must be a VocabularyShard or None, got {checks.describe(vocabulary)}. Of a process group with even "
            "shards: VocabularyShard.even(group, logits.shape[-1])."
        )
    return vocabulary


def checked_shard(
    check: Check, logits: Any, vocabulary: Any, overwritten: str | None
) -> tuple[Any, VocabularyShard | None]:
    """This rank's part of the logits, and which entries it holds; None: rows are whole. overwritten: the argument that asks
    for a gradient in their place.
    """
    shard = check_shard(check, vocabulary)
    if overwritten is not None and is_sharded_in(logits, -1):
        check.overwritable(overwritten, logits)  # whose local part hides that it is a leaf
    return local_shard(logits, -1, shard)


def local_shard(tensor: Any, dim: int, vocabulary: VocabularyShard | None) -> tuple[Any, VocabularyShard | None]:
    """This rank's part of a DTensor that is sharded in `dim` and nowhere else, and where it lies; anything else as it is."""
    if not is_sharded_in(tensor, dim):
        return tensor, vocabulary
    shard = VocabularyShard.of_dtensor(tensor, dim) if vocabulary is None else vocabulary
    return tensor.to_local(grad_placements=tensor.placements), shard


def statistics_of_shard(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, softcap: float | None, shift: bool,
    inplace: bool, shard: VocabularyShard,
) -> RowStatistics:  # fmt: skip
    """Of whole rows, each in the shape of token_ids and the same on all ranks; logp and entropy with this shard's gradient."""
    settings, place = (temperature, softcap, shift), (shard.start, shard.size)
    inplace = inplace and views.viewable(logits, shift) and not torch.compiler.is_compiling()
    states = _states_op(logits.detach(), token_ids, mask, *settings, *place)
    merged = MergedStatistics(
        *_merge_op(collectives.gathered(states, shard.group), token_ids, mask, *settings, shard.size)
    )
    logp, entropy = _attach(logits, token_ids, mask, *merged, *settings, *place, inplace)
    return RowStatistics(logp, entropy, merged.score_sqnorm, merged.lse)


# --- the state of a shard, and of all --------------------------------------------------------------------------------


def _token_states(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, softcap: float | None, shift: bool,
    start: int, size: int,
) -> Tensor:  # fmt: skip
    views.check_ids("token_stats", token_ids, mask, size, shift)
    width = width_of(logits.shape[-1], start, size)
    if width == 0 or token_ids.numel() == 0:
        return empty_states(token_ids, logits)
    rows = views.rows_of(logits[..., :width], shift)
    ids, valid = views.beside(token_ids - start, rows), views.beside(mask, rows)
    backend = registry.select("token_states", logits.device, logits.dtype, width)
    states: Tensor = backend.forward(rows, ids, valid, temperature=temperature, softcap=softcap, shift=shift)
    return states.view(NUMBERS, *token_ids.shape)


def empty_states(token_ids: Tensor, beside: Tensor) -> Tensor:
    """Of a shard without entries; beside: its logits, or hidden states."""
    empty = torch.tensor(EMPTY, dtype=wide(beside.dtype), device=beside.device)
    return empty.view(NUMBERS, *(1,) * token_ids.dim()).repeat(1, *token_ids.shape)


def _fake_states(logits: Tensor, token_ids: Tensor, *rest: Any) -> Tensor:
    return torch.empty((NUMBERS, *token_ids.shape), dtype=wide(logits.dtype), device=logits.device)


def merged_statistics(
    states: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, softcap: float | None, shift: bool,
    size: int,
) -> MergedStatistics:  # fmt: skip
    """Statistics of rows from the states [W, 5, ..] of all their shards, in the order of the ranks."""
    backend = registry.select("merged_statistics", states.device, states.dtype)
    merged = backend.forward(
        states, token_ids, mask, size, temperature=temperature, softcap=softcap, shift=shift
    )  # fmt: skip
    return MergedStatistics(*merged)


def _fake_merged(states: Tensor, token_ids: Tensor, *rest: Any) -> MergedStatistics:
    return MergedStatistics(*(states.new_empty(token_ids.shape) for _ in MergedStatistics._fields))


# --- the gradient of a shard -----------------------------------------------------------------------------------------


def _sharded(logits: Tensor, token_ids: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    merged = MergedStatistics(*rest[: len(MergedStatistics._fields)])
    return merged.logp.clone(), merged.entropy.clone()


def _fake_sharded(logits: Tensor, token_ids: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rest[0]), torch.empty_like(rest[0])


def _backward_into(out: Tensor, logits: Tensor, token_ids: Tensor, mask: Tensor | None, *rest: Any) -> None:
    """d logits of this shard into `out`, which may be `logits`: the row backward with ids counted from the shard's start."""
    count = len(MergedStatistics._fields)
    merged, (g, h, temperature, softcap, shift, start, size) = MergedStatistics(*rest[:count]), rest[count:]
    width = width_of(logits.shape[-1], start, size)
    out[..., width:] = 0
    if width == 0 or token_ids.numel() == 0:
        return
    rows = views.rows_of(logits[..., :width], shift)
    out_rows = rows if out is logits else out.view(*rows.shape[:2], out.shape[-1])[..., :width]
    ids = token_ids - start
    target, logp = merged.target_logit, merged.logp
    retaken = _lost_digits(merged, softcap)
    if retaken is not None:  # the pivot is the peak, and the target's entry made below
        ids, target = torch.where(retaken, -1, ids), torch.where(retaken, merged.peak, target)
        logp = torch.where(retaken, -merged.log_total, logp)
    beside = (views.beside(t, rows) for t in (ids, mask, logp, merged.entropy, merged.lse, g, h))
    backend = registry.select("token_stats", logits.device, logits.dtype, width)
    backend.backward(
        out_rows, rows, *beside,
        temperature=temperature, softcap=softcap, shift=shift, target_logits=views.beside(target, rows),
    )  # fmt: skip
    if retaken is not None and g is not None:
        valid = views.valid_tokens(token_ids, mask, shift)
        retaken = retaken if valid is None else retaken & valid
        _write_targets(out_rows, token_ids - start, retaken, g / temperature, shift)


def write_scores(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, merged: MergedStatistics,
    settings: tuple[float, float | None, bool], start: int, size: int,
) -> None:  # fmt: skip
    """d logp / d logits over the logits [n, v] of a shard."""
    ones = torch.ones_like(merged.logp)
    _backward_into(logits, logits, token_ids, mask, *merged, ones, None, *settings, start, size)


def _lost_digits(merged: MergedStatistics, softcap: float | None) -> Tensor | None:
    """Rows whose p needs more digits than logp and lse have: their token is of probability 1e-14 or less.

    None with a softcap, whose own rounding is as large (LARGEST_SOFTCAP_RATIO), and for float64.
    """
    if softcap is not None or merged.logp.dtype == torch.float64:
        return None
    return (merged.lse.abs() > KEPT_DIGITS) & (merged.logp < -KEPT_DIGITS)


def _write_targets(out_rows: Tensor, ids: Tensor, where: Tensor, values: Tensor, shift: bool) -> None:
    """values at the tokens' entries of `out_rows` that lie in this shard, for the tokens of `where`."""
    in_sight = where & (ids >= 0) & (ids < out_rows.shape[-1])
    ids, in_sight, values = (views.beside(t, out_rows) for t in (ids, in_sight, values))
    if shift:
        ids, in_sight, values = (torch.roll(t, -1, 1) for t in (ids, in_sight, values))
    at = torch.where(in_sight, ids, 0)[..., None]
    old = out_rows.gather(-1, at)
    out_rows.scatter_(-1, at, torch.where(in_sight[..., None], values[..., None].to(old.dtype), old))


def _sharded_backward(logits: Tensor, *rest: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_into(out, logits, *rest)
    return out


def _fake_backward(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _sharded_backward_(logits: Tensor, *rest: Any) -> None:
    _backward_into(logits, logits, *rest)
    torch.autograd.graph.increment_version(logits)  # kernels write by address, which autograd does not see


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = 3 + len(MergedStatistics._fields)
    ctx.save_for_backward(*inputs[:tensors])
    *ctx.settings, ctx.inplace = inputs[tensors:]
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (ctx.arguments - 1)
    if grad_logp is None and grad_entropy is None:
        return (None, *nothing)
    logits, *saved = ctx.saved_tensors
    arguments = (logits, *saved, grad_logp, grad_entropy, *ctx.settings)
    if not ctx.inplace or logits_are_kept():
        return (_backward_op(*arguments), *nothing)
    written = logits.detach()  # shares storage and version counter; not a view of the graph
    _backward_op_(written, *arguments[1:])
    return (written, *nothing)


_TOKENS = "Tensor token_ids, Tensor? mask"
_MERGED = ", ".join(f"Tensor {name}" for name in MergedStatistics._fields)
_SAVED = f"{_TOKENS}, {_MERGED}, Tensor? grad_logp, Tensor? grad_entropy, {SETTINGS}, int start, int size"
_states_op = define_op(
    f"token_states(Tensor logits, {_TOKENS}, {SETTINGS}, int start, int size) -> Tensor", _token_states, _fake_states
)
_merge_op = define_op(
    f"merged_statistics(Tensor states, {_TOKENS}, {SETTINGS}, int size) -> ({MERGED_RETURNS})",
    merged_statistics, _fake_merged,
)  # fmt: skip
_attach = define_op(
    f"sharded_token_stats(Tensor logits, {_TOKENS}, {_MERGED}, {SETTINGS}, int start, int size, bool inplace_backward)"
    " -> (Tensor logp, Tensor entropy)",
    _sharded, _fake_sharded, _setup_context, _backward,
)  # fmt: skip
_backward_op = define_op(
    f"sharded_token_stats_backward(Tensor logits, {_SAVED}) -> Tensor", _sharded_backward, _fake_backward
)
_backward_op_ = define_op(
    f"sharded_token_stats_backward_(Tensor(a!) logits, {_SAVED}) -> ()", _sharded_backward_, nothing_returned
)
