"""Rows whose vocabulary several ranks share, in every way, and what one device makes of them whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import vcpo_kernels as vk
from tests.distributed import counting

B, T, H = 3, 5, 6


@dataclass(frozen=True)
class Case:
    """starts: of the shards; None: even ones. size: what is not padding. kind: what `whole` does to the rows."""

    size: int = 61
    starts: tuple[int, ...] | None = None
    kind: str = ""
    dtype: torch.dtype = torch.float32
    magnitude: float = 3.0
    temperature: float = 1.0
    softcap: float | None = None
    shift: bool = False
    masked: bool = False
    entropy: bool = True
    inplace: bool = False
    backend: str = ""

    def entries(self, world: int) -> list[slice]:
        """Of each rank; the last even ones may reach past `size`."""
        if self.starts is None:
            step = -(-self.size // world)
            return [slice(r * step, (r + 1) * step) for r in range(world)]
        ends = (*self.starts[1:], self.size)
        return [slice(a, b) for a, b in zip(self.starts, ends, strict=True)]

    @property
    def settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "softcap": self.softcap, "shift": self.shift}


BACKENDS = ("reference", "native")
ROWS = {
    "padded": Case(),
    "uneven": Case(starts=(0, 7)),
    "an empty shard": Case(starts=(0, 61)),
    "an empty shard first": Case(starts=(0, 0)),
    "a shard of -inf": Case(kind="-inf shard"),
    "rows of -inf, NaN rows, -inf targets": Case(kind="broken"),
    "peaked": Case(kind="peaked"),
    "softcap": Case(softcap=5.0, temperature=0.7),
    "softcap, large": Case(softcap=30.0, magnitude=100.0),
    "masked": Case(masked=True),
    "shifted": Case(shift=True, masked=True),
    "large": Case(magnitude=1e3),
    "near-greedy": Case(temperature=1e-6, entropy=False),
    "large and near-greedy": Case(magnitude=1e3, temperature=1e-4, shift=True),
    "cold": Case(temperature=0.05),
    "bf16 in place": Case(dtype=torch.bfloat16, inplace=True, shift=True),
    "large bf16 in place": Case(dtype=torch.bfloat16, inplace=True, magnitude=300.0),
    "fp16": Case(dtype=torch.float16),
    "in place": Case(inplace=True, masked=True),
    "wide": Case(size=5000),
}
ROWS_OF_FOUR = {
    "five entries": Case(size=5),
    "uneven": Case(starts=(0, 1, 40, 40)),
    "a shard of -inf": Case(kind="-inf shard", shift=True),
    "broken": Case(kind="broken"),
    "large": Case(magnitude=1e3, temperature=0.1),
    "bf16 in place": Case(dtype=torch.bfloat16, inplace=True),
}


def whole(case: Case) -> dict[str, Tensor]:
    """Logits [B, T, size], ids, a mask, upstream gradients."""
    torch.manual_seed(0)
    logits = (torch.randn(B, T, case.size) * case.magnitude).to(case.dtype)
    ids = torch.randint(0, case.size, (B, T))
    ids[0, 0], ids[0, 1] = 0, case.size - 1
    mask = torch.rand(B, T) < 0.7
    if case.kind == "-inf shard":
        logits[..., (case.size + 1) // 2 :] = -torch.inf
        logits[1, 2] = torch.randn(case.size)
    if case.kind == "peaked":
        logits.scatter_(-1, ids[..., None], 40.0)
        logits[1].scatter_(-1, (ids[1, :, None] + 1) % case.size, 60.0)
    if case.kind == "broken":
        logits[0, 1] = -torch.inf
        logits[1, 1, 0] = torch.nan
        logits[2, 1, -1] = torch.nan
        logits[2, 3, ids[2, 3]] = -torch.inf
        logits[2, 4] = -torch.inf
        logits[2, 4, ids[2, 4]] = 1.0
    mask[0, 2:] = True
    if case.masked:
        ids = torch.where(mask, ids, -100)
    g, h = torch.randn(B, T), torch.randn(B, T)
    g[0, 3] = h[0, 3] = 0.0
    return {"logits": logits, "ids": ids, "mask": mask, "g": g, "h": h}


def rows_of_case(case: Case, entries: slice | None, group: Any) -> dict[str, Any]:
    """token_stats and weighted_logp of whole rows, or of this rank's entries, and their gradients."""
    x = whole(case)
    mask = x["mask"] if case.masked else None
    logits = x["logits"]
    shard = None
    if entries is not None:
        logits = torch.nn.functional.pad(logits, (0, max(0, entries.stop - case.size)), value=1e4)[..., entries]
        shard = vk.VocabularyShard(group, entries.start, case.size)
    leaf = logits.clone().requires_grad_()
    with counting.collectives() as forward:
        stats = vk.token_stats(
            leaf * 1, x["ids"], mask, inplace_backward=case.inplace, vocabulary=shard, **case.settings
        )  # fmt: skip
    loss = torch.where(x["g"] != 0, stats.logp * x["g"], 0.0).sum()
    if case.entropy:
        loss = loss + torch.where(x["h"] != 0, stats.entropy * x["h"], 0.0).sum()
    with counting.collectives() as backward:
        (grad,) = torch.autograd.grad(loss, leaf)
    c = x["g"].clone().requires_grad_()
    summed, others = vk.weighted_logp(
        leaf * 1, x["ids"], c, mask, inplace=case.inplace, vocabulary=shard, **case.settings
    )
    weighted, of_c = torch.autograd.grad(2 * summed, (leaf, c))
    names = ("logp", "entropy", "score_sqnorm", "lse")
    return {
        "entries": entries, "forward": forward, "backward": backward,
        "stats": {name: getattr(stats, name).detach() for name in names},
        "again": {name: getattr(others, name) for name in names},
        "grad": grad, "loss": summed.detach(), "weighted": weighted, "of_c": of_c,
    }  # fmt: skip


# --- the head --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCase:
    """frozen: neither weight nor bias takes a gradient. tied: the embedding is the weight. sums: as sum_hidden; else the parts
    are added up here.
    """

    case: Case = Case()
    memory: str = "auto"
    chunk_bytes: int = 1 << 20
    bias: bool = False
    frozen: bool = False
    tied: bool = False
    sums: bool = True


HEADS = {
    "fast": HeadCase(memory="fast"),
    "lean": HeadCase(Case(masked=True), memory="lean", chunk_bytes=700),
    "fast, masked": HeadCase(Case(masked=True, shift=True, entropy=False), memory="fast", bias=True),
    "auto, small chunks": HeadCase(Case(softcap=4.0, shift=True), chunk_bytes=600, bias=True),
    "frozen": HeadCase(Case(entropy=False), frozen=True),
    "frozen, small chunks": HeadCase(Case(masked=True), frozen=True, chunk_bytes=500),
    "uneven": HeadCase(Case(starts=(0, 7), entropy=False)),
    "an empty shard": HeadCase(Case(starts=(0, 61)), memory="lean"),
    "an empty shard, fast": HeadCase(Case(starts=(0, 0), entropy=False), memory="fast", bias=True),
    "tied": HeadCase(Case(starts=(0, 30)), tied=True),
    "bf16": HeadCase(Case(dtype=torch.bfloat16), memory="fast"),
    "parts of d hidden": HeadCase(memory="fast", sums=False),
    "parts of d hidden, an empty shard": HeadCase(
        Case(starts=(0, 61), masked=True), memory="lean", bias=True, sums=False
    ),
    "parts of d hidden, frozen": HeadCase(Case(entropy=False), frozen=True, sums=False),
}
HEADS_OF_FOUR = {
    "fast": HeadCase(memory="fast", bias=True),
    "lean": HeadCase(Case(starts=(0, 1, 40, 40), masked=True), memory="lean", chunk_bytes=400),
    "parts of d hidden": HeadCase(memory="lean", chunk_bytes=400, sums=False),
}


def whole_head(head: HeadCase) -> dict[str, Tensor]:
    x = whole(head.case)
    hidden = torch.randn(B, T, H).to(head.case.dtype)
    weight, bias = (t.to(head.case.dtype) for t in (torch.randn(head.case.size, H), torch.randn(head.case.size)))
    return {**x, "hidden": hidden, "weight": weight, "bias": bias}


def head_of_case(head: HeadCase, entries: slice | None, group: Any) -> dict[str, Any]:
    """linear_token_stats and linear_weighted_logp, whole or of this rank's part of the weight, and their gradients."""
    case, x = head.case, whole_head(head)
    mask = x["mask"] if case.masked else None
    weight, bias, shard = x["weight"], x["bias"], None
    if entries is not None:
        more = max(0, entries.stop - case.size)
        weight = torch.nn.functional.pad(weight, (0, 0, 0, more), value=100.0)[entries]
        bias = torch.nn.functional.pad(bias, (0, more), value=100.0)[entries]
        shard = vk.VocabularyShard(group, entries.start, case.size)
    weight, bias = (t.clone().requires_grad_(not head.frozen) for t in (weight, bias))
    hidden = x["hidden"].clone().requires_grad_()
    given = hidden * 1
    if head.tied:  # part of the embedding's rows are in this shard: its gradient has two parts
        given = given + (weight.sum(0) if entries is None else _summed(weight.sum(0), group))
    arguments = {"bias": bias if head.bias else None, "mask": mask, "vocabulary": shard, **case.settings}
    arguments |= {} if shard is None else {"sum_hidden": head.sums}
    wanted = [hidden] if head.frozen else [hidden, weight, *([bias] if head.bias else [])]
    with counting.collectives() as forward:
        stats = vk.linear_token_stats(
            given, weight, x["ids"], memory=head.memory, chunk_bytes=head.chunk_bytes, **arguments
        )
    loss = (stats.logp * x["g"]).sum() + ((stats.entropy * x["h"]).sum() if case.entropy else 0)
    with counting.collectives() as backward:
        grads = torch.autograd.grad(loss, wanted, retain_graph=True)
    c = x["g"].clone().requires_grad_()
    with counting.collectives() as of_sum:
        summed, _ = vk.linear_weighted_logp(given, weight, x["ids"], c, chunk_bytes=head.chunk_bytes, **arguments)
        weighted = torch.autograd.grad(summed, [*wanted, c])
    if shard is not None and not head.sums:
        for d in (grads[0], weighted[0]):
            dist.all_reduce(d, group=group)
    return {
        "entries": entries, "forward": forward, "backward": backward, "sum": of_sum, "grads": grads, "weighted": weighted,
        "stats": {name: getattr(stats, name).detach() for name in ("logp", "entropy", "score_sqnorm", "lse")},
        "loss": summed.detach(),
    }  # fmt: skip


def _summed(value: Tensor, group: Any) -> Tensor:
    from torch.distributed.nn.functional import all_reduce

    total: Tensor = all_reduce(value, group=group)
    return value + (total - value).detach()


def on_rank(rank: int, rows: dict[str, Case], heads: dict[str, HeadCase]) -> dict[str, Any]:
    """Every case on this rank, by backend."""
    group, world = dist.group.WORLD, dist.get_world_size()
    results: dict[str, Any] = {}
    for backend in BACKENDS:
        with vk.use_backend(backend):
            for name, case in rows.items():
                results[f"{backend}, {name}"] = rows_of_case(case, case.entries(world)[rank], group)
            for name, head in heads.items():
                results[f"{backend}, head, {name}"] = head_of_case(head, head.case.entries(world)[rank], group)
    return results
