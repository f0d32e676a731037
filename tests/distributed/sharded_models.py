"""Models that FSDP2 shards in every way, one batch split over their ranks, and the same on one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vcpo_kernels as vk
from tests.head import tiny_models
from tests.sequence_gradients.models import VOCABULARY, token_model

B, T = 8, 6


def llama(tied: bool = False) -> nn.Module:
    model: Any = tiny_models.make("llama")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model  # type: ignore[no-any-return]


def made(name: str) -> Any:
    return {
        "tokens": lambda: token_model(),
        "tokens, tied": lambda: token_model(tied=True),
        "llama": lambda: llama(),
        "llama, tied": lambda: llama(tied=True),
    }[name]()


def sharded(name: str, placement: str, mesh: Any = None, **options: Any) -> Any:
    """placement: of units: "root" alone; "blocks" (and the root); "each", every module that has parameters; "head", the head
    alone and the blocks; "norm and head", as accelerate has it; ending in ", kept": that unit is not resharded.
    """
    from torch.distributed.fsdp import fully_shard

    model, where = made(name), placement.removesuffix(", kept")
    options |= {} if mesh is None else {"mesh": mesh}
    keep = {} if where == placement else {"reshard_after_forward": False}
    if where == "each":
        for module in [m for m in model.modules() if m._parameters]:
            fully_shard(module, **options)
    elif where != "root":
        for layer in model.model.layers:
            fully_shard(layer, **options)
        if where == "head":
            fully_shard(model.lm_head, **options, **keep)
        elif where == "norm and head":
            fully_shard([model.model.norm, model.lm_head], **options, **keep)
            fully_shard(model.model.embed_tokens, **options)
    return fully_shard(model, **options)


def batch(name: str) -> dict[str, Tensor]:
    vocabulary = VOCABULARY if name.startswith("tokens") else tiny_models.VOCABULARY
    torch.manual_seed(3)
    mask = torch.rand(B, T) < 0.8
    mask[:, 1] = True
    return {"ids": torch.randint(3, vocabulary, (B, T)), "mask": mask, "c": torch.randn(B)}


@dataclass(frozen=True)
class Rows:
    """This rank's part of the batch: rows [start, stop), in micro-batches of `size`."""

    start: int
    stop: int
    size: int

    @property
    def slices(self) -> list[slice]:
        return [slice(i, i + self.size) for i in range(self.start, self.stop, self.size)]


def head_stats(model: Any, ids: Tensor, mask: Tensor, head: str) -> vk.TokenStats:
    """head: "logits", or the memory mode of the fused one."""
    if head == "logits":
        out = model(ids)
        return vk.token_stats(getattr(out, "logits", out), ids, mask, shift=True)
    with vk.patch_head(model):
        return model(ids).token_stats(ids, mask, memory=head)  # type: ignore[no-any-return]


def whole_of(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole_of(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """Relative to each parameter's largest entry, or a small part of the largest of all."""
    assert got.keys() == want.keys()
    largest = max(float(g.abs().max()) for g in want.values())
    for name, g in want.items():
        scale = max(float(g.abs().max()), 0.1 * largest)
        error = float((got[name] - g).abs().max()) / scale
        assert error <= bound, f"{name}: {error:.1e}"
