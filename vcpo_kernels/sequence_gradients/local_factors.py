"""A module's input and output gradient as this rank's part of its parameters wants them, under tensor parallelism.

Layer: tokens. A weight split by its outputs has its own columns of the output gradient and the whole input; one split by its
inputs the other way round. What every rank has whole takes both whole: what sequence parallelism splits by tokens is gathered.
"""

from __future__ import annotations

from torch import Tensor, nn

from vcpo_kernels.parallel import collectives, tensor_parallel
from vcpo_kernels.parallel.tensor_parallel import Part
from vcpo_kernels.sequence_gradients.factors import ParameterGradient
from vcpo_kernels.sequence_gradients.module_rules import CONV1D, EMBEDDING, Gradients, Rule
from vcpo_kernels.sequence_gradients.row_owners import RowOwners


def laid_out(rule: Rule, weight: Part | None, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """x and grad as plain tensors of this rank. weight: what it has of the module's weight."""
    if weight is None or weight.dim is None:
        return tensor_parallel.whole(x), tensor_parallel.whole(grad)
    if rule is EMBEDDING:
        of_rows = weight.dim == 0
        return tensor_parallel.whole(x), tensor_parallel.whole(grad) if of_rows else weight.of_last_dimension(grad)
    of_inputs = weight.dim == (0 if rule is CONV1D else 1)
    if of_inputs:
        return weight.of_last_dimension(x), tensor_parallel.whole(grad)
    return tensor_parallel.whole(x), weight.of_last_dimension(grad)


def record(
    rule: Rule,
    module: nn.Module,
    site: str,
    owners: RowOwners,
    x: Tensor,
    grad: Tensor,
    into: Gradients,
    weight: Part | None,
) -> None:
    """What the rule makes of them, of this rank's part of the parameters. x, grad: as `laid_out` has them."""
    group = tensor_parallel.group_of_heads(module)
    found = into if group is None else {name: ParameterGradient(g.name) for name, g in into.items()}
    rule.record(module, site, owners, x, grad, found)
    if rule is EMBEDDING and weight is not None and weight.dim == 0:
        lookups = into["weight"].lookups
        lookups[-1] = lookups[-1].within(weight.start, weight.stop)
    if group is not None:  # of this rank's heads: a sum over ranks comes before the square
        for name, g in found.items():
            assert g.whole is not None
            into[name].add_whole(collectives.summed(g.whole, group))
