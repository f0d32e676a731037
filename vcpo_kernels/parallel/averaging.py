"""Averaging gradients over a process group, once, as DistributedDataParallel would have.

Layer: process groups. For whoever formed `param.grad` outside of DDP's own hooks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 << 20  # DDP's own size: large enough for the link, small beside the gradients


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """param.grad becomes its mean over the ranks, in place. A rank without a gradient counts as zeros.

    Averaging what is the same on all ranks already changes nothing, so that earlier, averaged parts may be in it.
    """
    ranks = dist.get_world_size(group)
    for bucket in _buckets([_grad(p) for p in parameters]):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat, group=group)
        flat /= ranks
        for grad, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(grads: list[Tensor]) -> Iterable[list[Tensor]]:
    """Consecutive gradients of one dtype and device, about BUCKET_BYTES together."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        alike = not bucket or (grad.dtype, grad.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size >= BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
    if bucket:
        yield bucket
