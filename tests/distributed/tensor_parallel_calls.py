"""What SequenceGradients and patch_head refuse under tensor parallelism, and a plain part of a head's weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vcpo_kernels as vk
from tests.distributed import sharded_models as models
from tests.distributed import shared_models, vocabulary_calls


class Heads(nn.Module):
    """A norm over heads that are split, and of which the plan says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.norm = nn.RMSNorm(2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.table(ids))
        return self.down(self.norm(x.unflatten(-1, (-1, 2))).flatten(-2))


class Head(nn.Module):
    """A head that a Megatron-like loop holds a plain part of: 7 rows of 13, the last rank's last one padding."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.whole = torch.randn(13, 4)
        self.table, self.head = nn.Embedding(13, 4), nn.Linear(4, 7, bias=False)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(13, 4))
            self.head.weight.copy_(torch.cat([self.whole, torch.ones(1, 4)])[7 * rank : 7 * rank + 7])


def refusals(mesh: Any) -> dict[str, str]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.distributed.tensor.placement_types import _StridedShard
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    ids = torch.randint(0, 9, (2, 3))
    heads = parallelize_module(Heads(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    norm = shared_models.made()
    norm.norm.weight = nn.Parameter(distribute_tensor(norm.norm.weight.detach(), mesh, [Shard(0)]))
    rowwise = parallelize_module(shared_models.made(), mesh, {"head": RowwiseParallel(input_layouts=Replicate())})
    x = shared_models.batch()

    def of_heads() -> None:
        segments = vk.Segments.padded(torch.ones(2, 3))
        with vk.SequenceGradients(heads) as grads:
            grads.backward(segments.sum(vk.token_stats(heads(ids), ids).logp), segments)
            grads.squared_norms()

    def plain_logits() -> None:
        model = Head(dist.get_rank())
        shard = vk.VocabularyShard.even(dist.group.WORLD, 7, 13)
        segments = vk.Segments.padded(torch.ones(2, 3))
        with vk.SequenceGradients(model) as grads:
            stats = vk.token_stats(model.head(model.table(ids)), ids, vocabulary=shard)
            grads.backward(segments.sum(stats.logp), segments)

    def fused(model: Any) -> Any:
        with vk.patch_head(model):
            return model(x["ids"])

    whole, undeclared = shared_models.made(), shared_models.made()
    for model, placement in ((whole, Replicate()), (undeclared, Shard(0))):
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [placement]))
    styled, packed, message = shared_models.made(), shared_models.made(), vocabulary_calls.message
    ALL_PARALLEL_STYLES["all_reduce"].install_forward(styled.down, mesh)
    strided = distribute_tensor(packed.up.weight.detach(), mesh, [_StridedShard(0, split_factor=2)])
    packed.up.weight = nn.Parameter(strided)
    return {
        "style": message(lambda: vk.SequenceGradients(styled)),
        "packed": message(lambda: vk.SequenceGradients(packed)),
        "norm over heads": message(of_heads),
        "split norm": message(lambda: vk.SequenceGradients(norm)),
        "plain logits": message(plain_logits),
        "rowwise head": message(lambda: fused(rowwise)),
        "whole head": message(lambda: fused(whole)),
        "undeclared head": message(lambda: fused(undeclared)),
    }


def plain_shard(rank: int) -> dict[str, Any]:
    """linear_token_stats with vocabulary= and a plain part of the weight, as Megatron has it."""
    model, ids = Head(rank), torch.randint(0, 13, (3, 4), generator=torch.Generator().manual_seed(4))
    segments, c = vk.Segments.padded(torch.ones(3, 4)), torch.tensor([1.0, -2.0, 0.5])
    found = []
    for whole in (False, True):
        if whole:
            model.head.weight = nn.Parameter(model.whole)
        shard = None if whole else vk.VocabularyShard.even(dist.group.WORLD, 7, 13)
        with vk.SequenceGradients(model) as grads:
            hidden = model.table(ids)
            stats = vk.linear_token_stats(hidden, model.head.weight, ids, vocabulary=shard, memory="lean")
            grads.backward(segments.sum(stats.logp), segments)
            norms = grads.squared_norms_by_parameter()
            grads.accumulate_(c)
        found.append({"norms": norms, "gradients": models.gradients_of(model)})
        model.zero_grad()
    part, want = found
    padded = torch.cat([want["gradients"]["head.weight"], torch.zeros(1, 4)])
    want["gradients"]["head.weight"] = padded[7 * rank : 7 * rank + 7]
    return {"got": part, "want": want}
