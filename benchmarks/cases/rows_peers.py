"""What others have for the work on rows: called as their own users call them.

Eager torch and torch.compile for any device; Liger, quack and flash-attention are kernels for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.case import Case
from benchmarks.cases.rows import (
    BACKWARD,
    BACKWARD_INPLACE,
    FORWARD,
    Oracle,
    RowInputs,
    eager_backward,
    eager_forward,
    gradient_error,
    statistics_error,
)
from benchmarks.harness import verify

# --- torch -----------------------------------------------------------------------------------------------------------


def eager_fp32_forward(x: RowInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Eager after an upcast, which its numbers need."""
    return eager_forward(RowInputs(x.logits.float(), x.token_ids, x.g))


def _logp(z: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(z.float(), -1).gather(-1, token_ids[:, None])[:, 0]


def eager_fp32_backward(x: RowInputs) -> Tensor:
    z = x.logits.detach().requires_grad_()
    return torch.autograd.grad(_logp(z, x.token_ids), z, x.g)[0]


_compiled_logp = torch.compile(_logp, dynamic=False)
_compiled_forward = torch.compile(lambda z, token_ids, g: eager_fp32_forward(RowInputs(z, token_ids, g)), dynamic=False)


def compiled_forward(x: RowInputs) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _compiled_forward(x.logits, x.token_ids, x.g)
    return result


def compiled_backward(x: RowInputs) -> Tensor:
    z = x.logits.detach().requires_grad_()
    return torch.autograd.grad(_compiled_logp(z, x.token_ids), z, x.g)[0]


# --- losses, which are -logp -----------------------------------------------------------------------------------------


def logp_of(x: RowInputs, losses_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor]:
    with torch.no_grad():
        return (-losses_of(x.logits, x.token_ids),)


def gradient_of(x: RowInputs, losses_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
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


def logp_error(got: Sequence[Tensor], want: Oracle) -> float:
    """Of a forward that gives no other statistic."""
    return verify.largest_error([t[want.index] for t in got], want.statistics[:1])


# --- Liger -----------------------------------------------------------------------------------------------------------


def liger_grpo(x: RowInputs, level: str, inplace: bool) -> Tensor:
    """Liger's fused GRPO loss at ratio 1, without KL and clipping, whose gradient is then that of sum(g logp).

    It takes [B, L + 1, V] and no use of each last row; here B = N / L with one advantage each.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    batch, length = _liger_batch(len(x.logits))
    leaf = x.logits.detach().requires_grad_()
    logits = leaf.view(batch, length + 1, -1)
    ids = x.token_ids.view(batch, length + 1)[:, :length].contiguous()
    advantages = x.g.view(batch, length + 1)[:, 0] * (batch * length)
    loss, _ = triton_grpo_loss(
        logits, None, None, ids, advantages, None, temperature=1.0, beta=0.0, inplace=inplace, loss_type="bnpo",
        importance_sampling_level=level, reduce=True,
    )  # fmt: skip
    return torch.autograd.grad(-loss, leaf)[0]


def _liger_batch(rows: int) -> tuple[int, int]:
    """Sequences of at most 512 tokens, one of which Liger leaves out of each."""
    length = min(512, rows)
    return rows // length, length - 1


def liger_error(got: Tensor, want: Oracle) -> float:
    """As any gradient's, where the rows that Liger leaves out have none."""
    length = _liger_batch(len(got))[1]
    counts = (want.index % (length + 1) != length)[:, None]
    return verify.relative_error(got[want.index], torch.where(counts, want.gradient, 0.0))


# --- the cases -------------------------------------------------------------------------------------------------------


LIGER_SEQUENCE, LIGER_TOKEN = "Liger triton_grpo_loss, sequence", "Liger triton_grpo_loss, token"
_LIGER, _QUACK = "liger_kernel.transformers.grpo_loss", "quack.cross_entropy"
_FLASH, _FLASH_MODULE = "flash-attn cross_entropy_loss", "flash_attn.ops.triton.cross_entropy"
_liger_sequence = partial(liger_grpo, level="sequence", inplace=False)
_liger_inplace = partial(liger_grpo, level="sequence", inplace=True)
_liger_token = partial(liger_grpo, level="token", inplace=False)
_torch_fp32 = partial(gradient_of, losses_of=torch_cross_entropy)

KERNELS = (
    Case(LIGER_SEQUENCE, BACKWARD, _liger_sequence, liger_error, _LIGER, floor_nv=3),
    Case(LIGER_SEQUENCE, BACKWARD_INPLACE, _liger_inplace, liger_error, _LIGER, floor_nv=3, inplace=True),
    Case(LIGER_TOKEN, BACKWARD, _liger_token, liger_error, _LIGER, floor_nv=3),
    Case("quack cross_entropy", FORWARD, partial(logp_of, losses_of=quack), logp_error, _QUACK, floor_nv=1),
    Case("quack cross_entropy", BACKWARD, partial(gradient_of, losses_of=quack), gradient_error, _QUACK, floor_nv=3),
    Case(_FLASH, FORWARD, partial(logp_of, losses_of=flash_attention), logp_error, _FLASH_MODULE, floor_nv=1),
    Case(_FLASH, BACKWARD, partial(gradient_of, losses_of=flash_attention), gradient_error, _FLASH_MODULE, floor_nv=3),
    Case("torch cross_entropy, fp32", BACKWARD, _torch_fp32, gradient_error, "torch", floor_nv=3, buffers=8),
)
EAGER = (
    Case("torch eager", FORWARD, eager_forward, statistics_error, "torch", floor_nv=1, buffers=6),
    Case("torch eager", BACKWARD, eager_backward, gradient_error, "torch", floor_nv=3, buffers=6),
    Case("torch eager, fp32", FORWARD, eager_fp32_forward, statistics_error, "torch", floor_nv=1, buffers=12),
    Case("torch eager, fp32", BACKWARD, eager_fp32_backward, gradient_error, "torch", floor_nv=3, buffers=12),
)
COMPILED = (
    Case("torch.compile", BACKWARD, compiled_backward, gradient_error, "torch", floor_nv=3, buffers=6),
    Case("torch.compile", FORWARD, compiled_forward, statistics_error, "torch", floor_nv=1, buffers=6),
)
