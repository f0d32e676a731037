"""linear_token_stats: token_stats of hidden states and a head's weight, without keeping the logits, or in their place.

Layer: rows [N, H] x [V, H] -> tokens [N]. The op `vcpo_kernels::linear_token_stats`, its backward, fakes, autograd, and
the public function. Chunks, GEMMs and the gathering of live rows are in `_head.py`; the row kernels are token_stats's
and score_rows's in `backends/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.library import LIBRARY, qualified
from vcpo_kernels.head import arguments as _head_inputs
from vcpo_kernels.head import deferred as _deferred
from vcpo_kernels.head import operands as _head
from vcpo_kernels.head.operands import Head
from vcpo_kernels.rows import views as _rows
from vcpo_kernels.rows.token_stats import TokenStats

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
    chunk_bytes: int = _head.CHUNK_BYTES,
    fast_bytes: int | None = None,
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
    - "auto": "fast" where S fits into `fast_bytes`, else "lean".

    Where neither weight nor bias needs a gradient (LoRA, a frozen head) all three are the same: S W [N, H] is formed
    chunk by chunk in the forward, 2 GEMMs, no [N, V].

    Args:
        hidden: [.., H], bfloat16, float16, float32 (or float64: reference backend), any strides.
        weight: [V, H], an nn.Linear's. Under autocast both are cast as F.linear casts; otherwise two dtypes meet in the
            one torch promotes them to, at the cost of a copy.
        token_ids, mask, temperature, softcap, shift: as in `token_stats`, with logits [.., V].
        bias: [V] or None.
        memory: "auto", "fast" or "lean".
        chunk_bytes: size of the buffer for logits. Accumulators beside it, only where they do not fit one chunk:
            fp32 [N, H] in the backward. Gradients of the weight are accumulated in fp32 and rounded once.
        fast_bytes: what S may take under "auto". None: half of the memory that is free on the device.

    Returns:
        TokenStats, each field in the shape of token_ids.

    Raises:
        TypeError, ValueError: naming the argument, what it got, what it wants; ids as in `token_stats`.

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
    parameters, deferral = (weight, bias), _deferred.deferral_of(weight, bias)
    hidden, weight, bias, token_ids, mask, temperature, softcap = _head_inputs.checked(
        check, hidden, weight, token_ids, bias, mask, temperature, softcap, shift
    )
    arguments = (
        hidden, weight, bias, token_ids, mask, temperature, softcap, shift, memory, chunk_bytes, fast_bytes
    )  # fmt: skip
    if deferral is not None:
        outputs = deferral.linear_token_stats(parameters, *arguments)
    else:
        needs = _head_inputs.needs_grad(hidden, weight, bias)
        outputs = torch.ops.vcpo_kernels.linear_token_stats(*arguments, *needs)
    logp, entropy, score_sqnorm, lse = outputs[:4]
    return TokenStats(logp, entropy, score_sqnorm.detach(), lse.detach(), shift)


# --- the ops ---------------------------------------------------------------------------------------------------------

_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask"
_SETTINGS = "float temperature, float? softcap, bool shift"
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
LIBRARY.define(
    f"linear_token_stats({_OPERANDS}, {_SETTINGS}, str memory, int chunk_bytes, int? fast_bytes, {_NEEDS})"
    # target_logit: of the sampled token. entries: flat indices of the rows that were computed, none for all.
    # kept: S [M, V] ("fast"), S W [M, H] (nothing but hidden needs a gradient), or nothing
    " -> (Tensor logp, Tensor entropy, Tensor score_sqnorm, Tensor lse, Tensor target_logit, Tensor entries, Tensor kept)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_SAVED = "Tensor logp, Tensor entropy, Tensor lse, Tensor target_logit, Tensor entries, Tensor kept"
LIBRARY.define(
    f"linear_token_stats_backward({_OPERANDS}, {_SAVED}, Tensor? grad_logp, Tensor? grad_entropy, {_SETTINGS},"
    f" int chunk_bytes, {_NEEDS}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear_token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None,
    temperature: float, softcap: float | None, shift: bool, memory: str, chunk_bytes: int, fast_bytes: int | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _rows.check_ids(Check("linear_token_stats"), token_ids, mask, len(weight), shift)
    entries = _head.live_entries(token_ids, mask, shift)
    head = _head.gathered(hidden, weight, bias, token_ids, mask, entries, temperature, softcap, shift)
    stats, targets = (
        _head.empty_statistics(head),
        torch.empty_like(head.token_ids, dtype=_head.stats_dtype(hidden.dtype)),
    )
    kept = hidden.new_empty(0, len(weight))
    with _head_inputs.no_autocast(hidden):
        if (needs_weight or needs_bias) and _takes_fast(head, memory, fast_bytes):
            kept = _head.empty_large((head.rows, head.vocabulary), hidden)
            _scores_of_all(head, kept, stats, targets)
        elif needs_hidden and not (needs_weight or needs_bias):
            kept = hidden.new_empty(head.rows, hidden.shape[-1])
            _scores_by_weight(head, kept, chunk_bytes, stats, targets)
        else:
            _head.statistics(head, chunk_bytes, stats, targets)
    outputs = (_head.scattered(s, entries, token_ids.shape) for s in (*stats, targets))
    return (*outputs, token_ids.new_empty(0) if entries is None else entries, kept)


def _takes_fast(head: Head, memory: str, fast_bytes: int | None) -> bool:
    if memory != "auto":
        return memory == "fast"
    size = head.rows * head.vocabulary * head.hidden.element_size()
    return size <= (_head.free_bytes(head.hidden.device) // 2 if fast_bytes is None else fast_bytes)


def _scores_of_all(head: Head, scores: Tensor, stats: list[Tensor], targets: Tensor) -> None:
    """scores [M, V], written by one GEMM: libraries rearrange the weight once per call, which chunks would multiply."""
    every = slice(0, head.rows)
    head.logits(scores)
    targets[every] = _head.target_logits(head, scores, every)
    _head.row_scores_(head, scores, every, None, stats)


def _scores_by_weight(head: Head, product: Tensor, chunk_bytes: int, stats: list[Tensor], targets: Tensor) -> None:
    """product [M, H] = S W, written."""
    for rows, logits in _head.chunks(head, chunk_bytes):
        targets[rows] = _head.target_logits(head, logits, rows)
        _head.row_scores_(head, logits, rows, None, stats)
        torch.mm(logits, head.weight, out=product[rows])


def _linear_token_stats_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None,
    logp: Tensor, entropy: Tensor, lse: Tensor, target_logit: Tensor, entries: Tensor, kept: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, temperature: float, softcap: float | None, shift: bool,
    chunk_bytes: int, needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head, saved, index, at = taking_part(
        (hidden, weight, bias, token_ids, mask), (logp, entropy, lse, target_logit), entries,
        grad_logp, grad_entropy, temperature, softcap, shift,
    )  # fmt: skip
    needs = (needs_hidden, needs_weight, needs_bias)
    with _head_inputs.no_autocast(hidden):
        if saved.h is not None or not kept.numel():
            d = _head.gradients(head, recomputed(head, saved, chunk_bytes), needs, head.hidden)
        elif needs_weight or needs_bias:
            d = from_scores(head, kept, index, saved.g, chunk_bytes, needs)
        else:
            product = kept if index is None else kept[index]
            d = ((product * saved.g[:, None]).to(hidden.dtype), hidden.new_empty(0), hidden.new_empty(0))
    return (_head.scattered_rows(d[0], at, hidden, shift) if needs_hidden else d[0], *d[1:])


@dataclass(frozen=True)
class Saved:
    """Of the rows that take part in a backward, each [M]: what the forward saved, and the upstream gradients."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    target_logit: Tensor
    g: Tensor
    h: Tensor | None

    def selected(self, index: Tensor) -> Saved:
        logp, entropy, lse, target_logit, g = (
            t[index] for t in (self.logp, self.entropy, self.lse, self.target_logit, self.g)
        )
        return Saved(logp, entropy, lse, target_logit, g, None if self.h is None else self.h[index])


def taking_part(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
    entries: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> tuple[Head, Saved, Tensor | None, Tensor | None]:
    """Of a backward: the head and saved values of the rows with a gradient, which of the forward's rows these are (None:
    all), and their flat indices into token_ids (None: all).

    operands: hidden, weight, bias, token_ids, mask. statistics: logp, entropy, lse, target_logit.
    """
    token_ids, mask = operands[3:]
    at = entries if len(entries) else None
    head = _head.gathered(*operands, at, temperature, softcap, shift)
    live = _rows.counts(token_ids, mask, shift)

    def rows(value: Tensor | None, of_live: bool = False) -> Tensor:
        value = torch.zeros_like(statistics[0]) if value is None else value
        return _head.live_values(value if live is None or not of_live else torch.where(live, value, 0.0), at)

    h = None if grad_entropy is None else rows(grad_entropy, of_live=True)
    logp, entropy, lse, target_logit = (rows(s) for s in statistics)
    saved = Saved(logp, entropy, lse, target_logit, rows(grad_logp, of_live=True), h)
    index = None if _head.capturing(token_ids) else _rows_with_gradient(saved)
    if index is not None:
        head, saved, at = head.selected(index), saved.selected(index), index if at is None else at[index]
    return head, saved, index, at


def _rows_with_gradient(saved: Saved) -> Tensor | None:
    """Indices [m] of the rows whose upstream gradient is not exactly 0; None where that is all of them."""
    active = saved.g != 0  # so is a NaN, which goes on to where it shows
    if saved.h is not None:
        active |= saved.h != 0
    index = active.nonzero().squeeze(1)
    return None if len(index) == len(active) else index


def recomputed(head: Head, saved: Saved, chunk_bytes: int) -> _head.Blocks:
    """d logits by blocks of the vocabulary, in one reused buffer."""
    for entries, block in _head.vocabulary_blocks(head, chunk_bytes):
        recompute_block(head, saved, entries, block)
        yield entries, block


def recompute_block(head: Head, saved: Saved, entries: slice, block: Tensor) -> None:
    """d logits of some entries of the vocabulary, into block [M, entries]."""
    backend = registry.select("token_stats", head.hidden.device, head.hidden.dtype)
    head.logits(block, entries=entries)
    backend.backward(
        block[None], block[None], head.token_ids[None] - entries.start, _batched(head.mask),
        *(_batched(t) for t in (saved.logp, saved.entropy, saved.lse, saved.g, saved.h)),
        target_logits=_batched(saved.target_logit), **head.settings,
    )  # fmt: skip


def _batched(values: Tensor | None) -> Tensor | None:
    """[M] as the [1, M] that row kernels take."""
    return None if values is None else values.contiguous()[None]


def from_scores(
    head: Head, scores: Tensor, index: Tensor | None, g: Tensor, chunk_bytes: int, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """From S [M, V]: d hidden = g (S W), d weight = S^T (g hidden). Of the rows of `index` alone, where given."""
    blocks: _head.Blocks = [(slice(0, head.vocabulary), scores)]
    if index is not None:
        blocks = (
            (entries, torch.index_select(scores[:, entries], 0, index, out=block))
            for entries, block in _head.vocabulary_blocks(head, chunk_bytes)
        )
    scaled = (head.hidden * g[:, None]).to(head.hidden.dtype)
    grad_hidden, grad_weight, grad_bias = _head.gradients(head, blocks, needs, scaled, g)
    if needs[0]:
        grad_hidden = (grad_hidden * g[:, None]).to(head.hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def _fake_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor | None,
    temperature: float, softcap: float | None, shift: bool, memory: str, chunk_bytes: int, fast_bytes: int | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    stats = _head_inputs.fake_statistics(hidden, token_ids, 5)
    rows, entries = _head_inputs.fake_rows(token_ids, mask, shift)
    if needs_weight or needs_bias:
        kept_rows = {"fast": rows, "lean": 0}.get(memory)
        kept = hidden.new_empty(
            torch.library.get_ctx().new_dynamic_size() if kept_rows is None else kept_rows, len(weight)
        )
    elif needs_hidden:
        kept = hidden.new_empty(rows, hidden.shape[-1])
    else:
        kept = hidden.new_empty(0, len(weight))
    return (*stats, entries, kept)


def _fake_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _head_inputs.fake_gradients(hidden, weight, rest[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.temperature, ctx.softcap, ctx.shift, _, ctx.chunk_bytes, _ = inputs[:11]
    ctx.needs = inputs[11:]
    logp, entropy, _, lse, target_logit, entries, kept = output
    ctx.save_for_backward(*operands, logp, entropy, lse, target_logit, entries, kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    nothing = (None,) * 11
    if grad_logp is None and grad_entropy is None:
        return (None, None, None, *nothing)
    gradients = torch.ops.vcpo_kernels.linear_token_stats_backward(
        *ctx.saved_tensors,
        grad_logp,
        grad_entropy,
        ctx.temperature,
        ctx.softcap,
        ctx.shift,
        ctx.chunk_bytes,
        *ctx.needs,
    )
    return (*(d if needed else None for d, needed in zip(gradients, ctx.needs, strict=True)), *nothing)


for _name, _implementation, _fake in (
    ("linear_token_stats", _linear_token_stats, _fake_forward),
    ("linear_token_stats_backward", _linear_token_stats_backward, _fake_backward),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified(_name), _fake, lib=LIBRARY)
torch.library.register_autograd(qualified("linear_token_stats"), _autograd, setup_context=_setup_context, lib=LIBRARY)
