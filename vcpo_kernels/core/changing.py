"""Numbers that change from call to call under torch.compile, as tensors in the graph.

Layer: core. Loaded while a graph is traced, and never otherwise: it imports torch._dynamo.

A float that has changed between two calls is an input of the graph. What tensors do with it stays in the graph; any other use
(an op's `float`, math.log) takes its value at that time, with a guard, and the next value is compiled anew. torch's
AOTAutogradCache, however, tells such graphs apart by their code, which does not show that value: it gives a later graph the
machine code of an earlier one, of another process even (torch 2.6 to 2.13 at least). So ops take a number that may change as a
0-d tensor, which is right and needs one graph; and since a call of `as_tensor` has no entry in that cache, the graphs that
hold one are compiled by what is in them.
"""

from __future__ import annotations

import torch
import torch.fx.experimental.symbolic_shapes
import torch.fx.node
from torch import Tensor

from vcpo_kernels.core.scalars import used

# None in older torch, which does not tell them apart.
_has_static_value = getattr(torch.fx.experimental.symbolic_shapes, "has_static_value", None)


def may_change(number: float) -> bool:
    """Whether a number is an input of the graph. Constants stay constants: tensors on the CPU forbid CUDA graphs."""
    return _has_static_value is None or not _has_static_value(number)


torch.fx.node.has_side_effect(torch.ops.vcpo_kernels.used.default)


@torch.compiler.allow_in_graph
def as_tensor(number: float) -> Tensor:
    """In float64, on the CPU, where reading it waits for nothing. By an addition, which needs no value in the graph.

    Used even where nothing uses it, a bound that only a metric shows for instance: torch takes the value of what it finds
    without use, and compiles anew for the next.
    """
    tensor = torch.zeros((), dtype=torch.float64, device="cpu") + number
    used(tensor)
    return tensor
