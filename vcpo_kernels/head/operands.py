"""The language-model head in chunks: operands, live rows, and the GEMMs around the row kernels.

Layer: rows. logits = hidden weight^T + bias is never whole in memory unless asked for: forward passes take chunks of rows
[n, V], the recomputing backward takes blocks of the vocabulary [M, v]. GEMMs are torch's own library's.

Why the backward goes by vocabulary blocks: dW[v0:v1] is then finished by one GEMM over all rows, whose accumulator is
fp32 already. By chunks of rows every chunk would read and write an fp32 [V, H] (2.5 GB for V = 151936, H = 4096).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vcpo_kernels.core import registry
from vcpo_kernels.rows import views as _rows

CHUNK_BYTES = 256 << 20
ALIGN = 64  # entries: blocks of the vocabulary keep 16-byte accesses, and GEMM libraries their fast paths


@dataclass(frozen=True)
class Head:
    """One call's operands, of the M rows that count.

    hidden [M, H]; weight [V, H]; bias [V] or None; token_ids [M] int64; mask [M] bool, only where rows that do not count
    had to be left in.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    mask: Tensor | None
    temperature: float
    softcap: float | None

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def settings(self) -> dict[str, Any]:
        """What every row kernel takes."""
        return {"temperature": self.temperature, "softcap": self.softcap, "shift": False}

    def logits(self, out: Tensor, rows: slice = slice(None), entries: slice = slice(None)) -> Tensor:
        """hidden[rows] weight[entries]^T + bias[entries], written to `out`."""
        hidden, weight = self.hidden[rows], self.weight[entries].t()
        if self.bias is None:
            return torch.mm(hidden, weight, out=out)
        return torch.addmm(self.bias[entries], hidden, weight, out=out)

    def selected(self, index: Tensor) -> Head:
        """The head of some rows only."""
        mask = None if self.mask is None else self.mask[index]
        return replace(self, hidden=self.hidden[index], token_ids=self.token_ids[index], mask=mask)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def capturing(x: Tensor) -> bool:
    """Inside a CUDA graph capture nothing may depend on how many rows count: all are computed, and masked."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def live_entries(token_ids: Tensor, mask: Tensor | None, shift: bool) -> Tensor | None:
    """Flat indices into token_ids of the rows to compute, ascending; None for all.

    A mask's count is read once, which on a GPU waits for the mask.
    """
    if mask is not None and not capturing(token_ids):
        live = _rows.counts(token_ids, mask, shift)
        assert live is not None
        return live.flatten().nonzero().squeeze(1)
    if shift:
        every = torch.arange(token_ids.numel(), device=token_ids.device).view(token_ids.shape)
        return every[..., 1:].flatten()
    return None


def gathered(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    entries: Tensor | None,
    temperature: float,
    softcap: float | None,
    shift: bool,
) -> Head:
    """The operands with the rows of `entries` alone. With `shift`, the row before an entry is the one that predicts it."""
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.flatten()
    live = mask.flatten() if mask is not None and capturing(hidden) else None
    if entries is not None:
        rows, ids = rows[entries - int(shift)], ids[entries]
        live = None if live is None else live[entries]
    return Head(rows.contiguous(), weight, bias, ids, live, temperature, softcap)


def live_values(values: Tensor, entries: Tensor | None) -> Tensor:
    """Token-sized values at the head's rows, [M]."""
    return values.flatten() if entries is None else values.flatten()[entries]


def scattered(values: Tensor, entries: Tensor | None, shape: torch.Size) -> Tensor:
    """Per-row values [M, ..] at their entries, 0 elsewhere: [*shape, ..]."""
    whole = (*shape, *values.shape[1:])
    if entries is None:
        return values.view(whole)
    out = values.new_zeros(shape.numel(), *values.shape[1:])
    out[entries] = values
    return out.view(whole)


def scattered_rows(rows: Tensor, entries: Tensor | None, hidden: Tensor, shift: bool) -> Tensor:
    """Gradients [M, H] of the head's rows in the shape of hidden [.., H], 0 elsewhere."""
    return scattered(rows, None if entries is None else entries - int(shift), hidden.shape[:-1])


def free_bytes(device: torch.device) -> int:
    """Memory that could still be allocated. On a CPU what the system calls available; 0 where it does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            kib = next(line.split()[1] for line in file if line.startswith("MemAvailable:"))
        return int(kib) << 10
    except (OSError, StopIteration):
        return 0


def spans(total: int, step: int) -> Iterator[slice]:
    """[0, total) in equal pieces of at most `step`."""
    pieces = -(-total // max(step, 1))
    size = -(-total // max(pieces, 1))
    for begin in range(0, total, max(size, 1)):
        yield slice(begin, min(begin + size, total))


def rows_per_chunk(head: Head, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (head.vocabulary * head.hidden.element_size()))


def empty_large(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory, in huge pages on a CPU: faults of 4 KiB cost more than the GEMM that fills it."""
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if out.device.type == "cpu" and registry.native_problem() is None:
        from vcpo_kernels import _native

        _native.prepare_if_fresh(out.data_ptr(), out.numel() * out.element_size())
    return out


def chunks(head: Head, chunk_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """The logits [n, V] of consecutive rows, in one reused buffer."""
    buffer = None
    for rows in spans(head.rows, rows_per_chunk(head, chunk_bytes)):
        count = rows.stop - rows.start
        buffer = empty_large((count, head.vocabulary), head.hidden) if buffer is None else buffer
        yield rows, head.logits(buffer[:count], rows)


Blocks = Iterable[tuple[slice, Tensor]]


def vocabulary_blocks(head: Head, chunk_bytes: int) -> Blocks:
    """Consecutive entries of the vocabulary, and one reused buffer as [M, v] for each."""
    most = chunk_bytes // (max(head.rows, 1) * head.hidden.element_size())
    pieces = list(spans(head.vocabulary, max(most, 1)))
    if len(pieces) > 1 and most >= ALIGN:
        step = -(-(pieces[0].stop) // ALIGN) * ALIGN
        step = step if step <= most else most // ALIGN * ALIGN
        pieces = [slice(b, min(b + step, head.vocabulary)) for b in range(0, head.vocabulary, step)]
    buffer = empty_large((head.rows * pieces[0].stop,), head.hidden)
    for entries in pieces:
        count = entries.stop - entries.start
        yield entries, buffer[: head.rows * count].view(head.rows, count)


class Sum:
    """A sum of matrix products [rows, columns], in fp32 or float64, cast once at the end.

    A single product is left to the GEMM, whose accumulator is fp32 already. In bf16 and fp16, where torch's GEMM returns
    its own dtype, each of several is rounded once before it is added.
    """

    def __init__(self, rows: int, columns: int, like: Tensor, single: bool) -> None:
        self._like, self._single = like, single
        wide = like.dtype if single else stats_dtype(like.dtype)
        self._total = empty_large((rows, columns), like, wide)
        self._empty = True

    def add(self, a: Tensor, b: Tensor) -> None:
        """total += a b"""
        total, first = self._total, self._empty
        self._empty = False
        if total.dtype == a.dtype:
            torch.addmm(total, a, b, beta=0 if first else 1, out=total)  # beta 0: what is there is not read
            return
        for piece in spans(len(total), max(1, _PARTIAL_BYTES // (b.shape[1] * b.element_size()))):
            product = a[piece] @ b
            total[piece].copy_(product) if first else total[piece].add_(product)

    def result(self) -> Tensor:
        if self._empty:
            self._total.zero_()
        return self._total.to(self._like.dtype)


_PARTIAL_BYTES = 8 << 20  # of a product that waits to be added: small beside a chunk


def gradients(
    head: Head, blocks: Blocks, needs: tuple[bool, bool, bool], right: Tensor, row_factors: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """From D [M, V] by blocks of the vocabulary: D W [M, H], D^T right [V, H], D^T row_factors [V] (None: all 1).

    Those not needed are empty.
    """
    needs_hidden, needs_weight, needs_bias = needs
    hidden, weight = head.hidden, head.weight
    ones = torch.ones_like(hidden[:, :1]) if row_factors is None else row_factors[:, None].to(hidden.dtype)
    grad_weight = empty_large(tuple(weight.shape), hidden) if needs_weight else hidden.new_empty(0)
    grad_bias = hidden.new_empty(len(weight)) if needs_bias else hidden.new_empty(0)
    total = None
    for entries, d in blocks:
        if needs_weight:
            torch.mm(d.t(), right, out=grad_weight[entries])
        if needs_bias:
            grad_bias[entries] = (d.t() @ ones)[:, 0]
        if needs_hidden:
            single = d.shape[1] == head.vocabulary
            total = Sum(head.rows, hidden.shape[1], hidden, single) if total is None else total
            total.add(d, weight[entries])
    return hidden.new_empty(0) if total is None else total.result(), grad_weight, grad_bias


def row_statistics(head: Head, logits: Tensor, rows: slice, into: list[Tensor]) -> None:
    """token_stats of logits [n, V], the head's `rows`, put at `rows` of logp, entropy, score_sqnorm, lse [M]."""
    backend = registry.select("token_stats", logits.device, logits.dtype, logits.shape[-1])
    mask = None if head.mask is None else head.mask[None, rows]
    outputs = backend.forward(logits[None], head.token_ids[None, rows], mask, **head.settings)
    for whole, part in zip(into, outputs, strict=True):
        whole[rows] = part[0]


def row_scores_(head: Head, logits: Tensor, rows: slice, coefficients: Tensor | None, into: list[Tensor]) -> None:
    """As row_statistics, and logits become c d logp / d logits in the same pass."""
    backend = registry.select("score_rows", logits.device, logits.dtype, logits.shape[-1])
    mask = None if head.mask is None else head.mask[None, rows]
    c = None if coefficients is None else coefficients[None, rows]
    outputs = backend.forward(logits[None], logits[None], head.token_ids[None, rows], mask, c, **head.settings)
    for whole, part in zip(into, outputs, strict=True):
        whole[rows] = part[0]


def empty_statistics(head: Head) -> list[Tensor]:
    """logp, entropy, score_sqnorm, lse, each [M]."""
    dtype = stats_dtype(head.hidden.dtype)
    return [torch.empty(head.rows, dtype=dtype, device=head.hidden.device) for _ in range(4)]


def target_logits(head: Head, logits: Tensor, rows: slice) -> Tensor:
    """The sampled token's logit of each row [n], which a block of the vocabulary does not always hold."""
    ids = head.token_ids[rows].clamp(0, head.vocabulary - 1)  # an unknown id has a NaN logp, and must not fault here
    return logits.gather(1, ids[:, None])[:, 0].to(stats_dtype(logits.dtype))


def statistics(head: Head, chunk_bytes: int, into: list[Tensor], targets: Tensor | None = None) -> None:
    """token_stats of all rows, chunk by chunk; their target_logits [M] too, where asked for."""
    for rows, logits in chunks(head, chunk_bytes):
        if targets is not None:
            targets[rows] = target_logits(head, logits, rows)
        row_statistics(head, logits, rows, into)
