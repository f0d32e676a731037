"""What autograd's graph tells before a backward runs: its shape, its leaves, and whether data decides where rows go.

Layer: sequences. Reads names and shapes of nodes, never a tensor: 0.4 ms for a hundred modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Ops whose rows go where the code says, whatever the tensors hold. Indexing, sorting, scattering and anything unknown
# (a Function of Python's, a new op) are absent: for them one backward says nothing about the next.
_FIXED = """
    Abs Add Addmm Alias Baddbmm Bmm Cat Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Expand Expm1 FusedRmsNorm Gelu Glu
    Hardswish LeakyRelu Linear Log Log1P LogSigmoid LogSoftmax Logsumexp MaskedFill Mean Mish Mm Mul NativeDropout
    NativeLayerNorm Neg Permute Pow Reciprocal Relu Repeat ReshapeAlias Rsqrt Rsub ScaledDotProductCudnnAttention
    ScaledDotProductEfficientAttention ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu Select Sigmoid Silu
    Sin Slice Softmax Softplus Split SplitWithSizes Sqrt Squeeze Stack Sub Sum T Tanh ToCopy Transpose Tril Triu Unbind
    UnsafeSplit UnsafeView Unsqueeze Var View Where
"""

_OF_SHARDS = "GeneratedBackwardFor_vcpo_kernels_sharded_token_stats"
_KNOWN_FUNCTIONS = ("vcpo_kernels.", "torch.distributed.tensor.", "torch.distributed.nn.", "transformers.distributed.")


@dataclass(frozen=True)
class Graph:
    """fingerprint: of its nodes and how they hang together. fixed: no node puts rows where data says, and what each of
    them returns leads with a multiple of B. leaves: tensors whose .grad a backward would add to. dtypes: of what
    carries gradients. shard_widths: of logits that hold a shard of the vocabulary.
    """

    fingerprint: int
    fixed: bool
    leaves: list[Tensor]
    dtypes: frozenset[torch.dtype]
    shard_widths: frozenset[int] = frozenset()

    @contextlib.contextmanager
    def leaves_untouched(self) -> Iterator[None]:
        """Backwards inside leave no gradient behind."""
        before = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        try:
            yield
        finally:
            for leaf, grad in zip(self.leaves, before, strict=True):
                leaf.grad = grad


@dataclass
class _Walk:
    names: list[str] = field(default_factory=list)
    fixed: bool = True
    leaves: list[Tensor] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    shard_widths: set[int] = field(default_factory=set)

    def see(self, node: Any, batch: int) -> None:
        self.names.append(node.name())
        if hasattr(node, "variable"):
            self.leaves.append(node.variable)
            return
        if node.name().startswith(_OF_SHARDS):
            logits, index = node.next_functions[0]
            self.shard_widths.add(logits._input_metadata[index].shape[-1])
        carried = node._input_metadata
        self.dtypes |= {m.dtype for m in carried}
        # any: outputs that carry no gradient (statistics, random states) are listed too
        self.fixed = self.fixed and _is_fixed(node) and any(_leads_with(m.shape, batch) for m in carried)


def graph_of(root: Tensor, batch: int) -> Graph:
    """The graph behind root. batch: B."""
    walk, seen, ahead = _Walk(), set(), [root.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        if node in seen:
            walk.names.append("")
            continue
        seen.add(node)
        walk.see(node, batch)
        ahead.extend(after for after, _ in node.next_functions)
    dtypes, widths = frozenset(walk.dtypes), frozenset(walk.shard_widths)
    return Graph(hash(tuple(walk.names)), walk.fixed, walk.leaves, dtypes, widths)


def _is_fixed(node: Any) -> bool:
    function = getattr(type(node), "_forward_cls", None)
    if function is not None:  # this package's own work row by row; what moves rows between ranks
        return bool(
            function.__module__.startswith(_KNOWN_FUNCTIONS)
            or function.__name__.startswith("GeneratedBackwardFor_vcpo_kernels_")
        )
    return node.name().rstrip("0123456789").removesuffix("Backward") in _FIXED.split()


def _leads_with(shape: Any, batch: int) -> bool:
    """Else it may hold what all sequences share: a mean over the batch, a scalar that is added to each of them."""
    return len(shape) > 0 and shape[0] > 0 and shape[0] % batch == 0
