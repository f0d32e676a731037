"""What others have for the same work, in the same run: called as their own users call them, verified like ours.

Each is run only where it imports. Floors are what the work needs, not what the peer moves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import linear_cases, token_stats_cases
from benchmarks.gpu import head_cases, row_cases
from benchmarks.gpu.clock import Timed
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.results import Row
from benchmarks.linear_cases import Gradients, LinearInputs
from benchmarks.token_stats_cases import Inputs

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

LIGER_SEQUENCE, LIGER_TOKEN = "Liger triton_grpo_loss, sequence", "Liger triton_grpo_loss, token"
# Peers round where we do not (bf16 probabilities, or log-probabilities): wrong here means another function.
PEER_GRADIENT_BOUND = 5e-2
PEER_STATISTICS_BOUND = 5e-1


@dataclass(frozen=True)
class Peer:
    """One competitor on logits. needs: the module it comes from. buffers: passes of NV in memory at once."""

    name: str
    work: str
    needs: str
    run: Callable[[Inputs], Any]
    inplace: bool = False
    buffers: int = 2

    def missing(self) -> str:
        return import_problem(self.needs)


def import_problem(module: str) -> str:
    """Why a module cannot be had here, or nothing."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package for another torch, or without a device, raises anything
        return f"{type(error).__name__}: {error}"[:200]
    return ""


# --- on logits -------------------------------------------------------------------------------------------------------


def liger_grpo(x: Inputs, level: str, inplace: bool) -> Tensor:
    """Liger's fused GRPO loss at ratio 1, without KL and clipping, whose gradient is then that of sum(g logp).

    It takes [B, L + 1, V] and no use of each last row; here B = N / L with one advantage each.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    batch, length = liger_batch(x)
    leaf = x.logits.detach().requires_grad_()
    logits = leaf.view(batch, length + 1, -1)
    ids = x.token_ids.view(batch, length + 1)[:, :length].contiguous()
    advantages = x.g.view(batch, length + 1)[:, 0] * (batch * length)
    loss, _ = triton_grpo_loss(
        logits, None, None, ids, advantages, None, temperature=1.0, beta=0.0, inplace=inplace, loss_type="bnpo",
        importance_sampling_level=level, reduce=True,
    )  # fmt: skip
    return torch.autograd.grad(-loss, leaf)[0]


def liger_batch(x: Inputs) -> tuple[int, int]:
    """Sequences of at most 512 tokens, one of which Liger leaves out of each."""
    rows = len(x.logits)
    length = min(512, rows)
    return rows // length, length - 1


def negative_losses(x: Inputs, losses_of: Callable[[Tensor, Tensor], Tensor], forward: bool) -> Any:
    """A cross entropy's losses are -logp: (logp,), or the gradient of sum(g logp)."""
    if forward:
        with torch.no_grad():
            return (-losses_of(x.logits, x.token_ids),)
    leaf = x.logits.detach().requires_grad_()
    losses = losses_of(leaf, x.token_ids)
    return torch.autograd.grad(losses, leaf, -x.g.to(losses.dtype))[0]


def quack(logits: Tensor, ids: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy  # type: ignore[import-not-found]

    losses: Tensor = cross_entropy(logits, ids, reduction="none")
    return losses


def flash_attention(logits: Tensor, ids: Tensor) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss  # type: ignore[import-not-found]

    losses: Tensor = cross_entropy_loss(logits, ids)[0]
    return losses


def torch_cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")


FORWARD, BACKWARD, BACKWARD_INPLACE = row_cases.FORWARD, row_cases.BACKWARD, row_cases.BACKWARD_INPLACE
_LIGER = "liger_kernel.transformers.grpo_loss"
_QUACK, _FLASH = "quack.cross_entropy", "flash_attn.ops.triton.cross_entropy"
LOGITS = (
    Peer(LIGER_SEQUENCE, BACKWARD, _LIGER, partial(liger_grpo, level="sequence", inplace=False)),
    Peer(LIGER_SEQUENCE, BACKWARD_INPLACE, _LIGER, partial(liger_grpo, level="sequence", inplace=True), inplace=True),
    Peer(LIGER_TOKEN, BACKWARD, _LIGER, partial(liger_grpo, level="token", inplace=False)),
    Peer("quack cross_entropy", FORWARD, _QUACK, partial(negative_losses, losses_of=quack, forward=True)),
    Peer("quack cross_entropy", BACKWARD, _QUACK, partial(negative_losses, losses_of=quack, forward=False)),
    Peer("flash-attn cross_entropy_loss", FORWARD, _FLASH,
         partial(negative_losses, losses_of=flash_attention, forward=True)),
    Peer("flash-attn cross_entropy_loss", BACKWARD, _FLASH,
         partial(negative_losses, losses_of=flash_attention, forward=False)),
    Peer("torch cross_entropy, fp32", BACKWARD, "torch",
         partial(negative_losses, losses_of=torch_cross_entropy, forward=False), buffers=8),
    Peer("torch eager", FORWARD, "torch", token_stats_cases.eager_forward, buffers=6),
    Peer("torch eager", BACKWARD, "torch", token_stats_cases.eager_backward, buffers=6),
    Peer("torch eager, fp32", FORWARD, "torch", token_stats_cases.eager_fp32_forward, buffers=12),
    Peer("torch eager, fp32", BACKWARD, "torch", token_stats_cases.eager_fp32_backward, buffers=12),
)  # fmt: skip
# Last of all, because compiling them takes longer than everything else.
COMPILED = (
    Peer("torch.compile", BACKWARD, "torch", token_stats_cases.compiled_backward, buffers=6),
    Peer("torch.compile", FORWARD, "torch", token_stats_cases.compiled_forward, buffers=6),
)


def rows_job(bench: Bench, peers: tuple[Peer, ...] = LOGITS) -> None:
    """Every peer on its own, written as soon as it is measured: a peer that hangs takes no other along."""
    from benchmarks.gpu.bench import measured_copy, shape_fields, time_in_turn

    shape = bench.plan.headline
    x = row_cases.make_inputs(shape, bench.device)
    oracle = row_cases.oracle_of(x)
    scratch = torch.empty_like(x.logits)
    copy = measured_copy(bench, shape, x, scratch)
    floors = {c.work: c.floor_nv for c in row_cases.CASES}
    for peer in peers:
        fields: Row = {
            "work": peer.work,
            "name": peer.name,
            **shape_fields(shape),
            "floor_nv": floors[peer.work],
            "peer": True,
        }
        if bench.skips(fields):
            continue
        if reason := peer.missing():
            bench.add("left out", {**fields, "reason": reason})
            continue
        if peer.buffers * shape.bytes > bench.free_bytes():
            bench.add("left out", {**fields, "reason": f"needs {peer.buffers} NV of memory"})
            continue
        on = Inputs(scratch, x.token_ids, x.g) if peer.inplace else x
        prepare = (lambda: scratch.copy_(x.logits)) if peer.inplace else (lambda: None)
        prepare()
        error = bench.guarded(fields, partial(error_of, peer, on, x, oracle))
        if error is None:
            continue
        fields["max_error"] = error
        if not error <= (PEER_STATISTICS_BOUND if peer.work == FORWARD else PEER_GRADIENT_BOUND):
            bench.add("left out", {**fields, "reason": f"another function: error {error:.2e} against float64"})
            continue
        time_in_turn(bench, shape, [(fields, Timed(partial(peer.run, on), prepare))], copy)


def error_of(peer: Peer, on: Inputs, x: Inputs, oracle: row_cases.Oracle) -> float:
    """Runs the peer. As Oracle.error; of a forward only the statistics that it has, of Liger only the rows it takes."""
    got = peer.run(on)
    if peer.work == FORWARD:
        pairs = zip((t[oracle.index] for t in got), oracle.statistics, strict=False)
        return max(float(((a.double() - b).abs() / (1 + b.abs())).max()) for a, b in pairs)
    wanted = oracle.gradient
    if peer.needs == _LIGER:
        length = liger_batch(x)[1]
        counts = (oracle.index % (length + 1) != length)[:, None]
        wanted = torch.where(counts, wanted, 0.0)
    return float((got[oracle.index].double() - wanted).norm() / wanted.norm())


def compiled_job(bench: Bench) -> None:
    rows_job(bench, COMPILED)


# --- through the head ------------------------------------------------------------------------------------------------


def liger_flsce(x: LinearInputs) -> Gradients:
    """Liger's fused linear scaled cross entropy, per-token losses."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return from_losses(x, lambda hidden, weight: Function.apply(hidden, weight, x.token_ids))


def cut_cross_entropy(x: LinearInputs) -> Gradients:
    """With its gradient filter, as it comes."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if x.hidden.is_cuda else "torch_compile"
    return from_losses(
        x, lambda hidden, weight: linear_cross_entropy(hidden, weight, x.token_ids, reduction="none", impl=impl)
    )


def from_losses(x: LinearInputs, losses_of: Callable[[Tensor, Tensor], Tensor]) -> Gradients:
    hidden, weight = x.leaves()
    losses = losses_of(hidden, weight)
    d_hidden, d_weight = torch.autograd.grad(losses, (hidden, weight), -x.g.to(losses.dtype))
    return d_hidden, d_weight


HEADS = (
    ("Liger FLSCE", "liger_kernel.ops.fused_linear_scaled_cross_entropy", liger_flsce, 4),
    ("cut_cross_entropy", "cut_cross_entropy", cut_cross_entropy, 4),
    ("torch eager", "torch", partial(linear_cases.eager, upcast=False), 3),
)


def head_job(bench: Bench) -> None:
    """One after another, as `rows_job`."""
    for name, needs, run, gemms in HEADS:
        fields = {**head_cases.head_fields(bench.plan, name, gemms), "peer": True}
        if bench.skips(fields):
            continue
        reason = import_problem(needs) or missing_tools(bench.plan, name)
        if reason:
            bench.add("left out", {**fields, "reason": reason})
            continue
        head_cases.measure(bench, [(fields, run)])


def missing_tools(plan: Plan, name: str) -> str:
    """cut_cross_entropy compiles on a CPU, which takes longer than a dry run has."""
    return "its kernel needs a GPU" if plan.device == "cpu" and name == "cut_cross_entropy" else ""
