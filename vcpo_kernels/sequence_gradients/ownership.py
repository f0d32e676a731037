"""The probe: whether each row's gradient is that of its own sequence's scalar, whatever the shapes look like.

Layer: sequences. A backward is linear in what it starts from. Started from u_i in the place of 1, a row that depends on
sequence i alone has u_i times its gradient; one that belongs to another sequence, or to several, has not. With powers of two
for u that holds to the bit in every dtype, but for what a GPU adds up in another order. Rows without a gradient say nothing
and add nothing to any norm.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vcpo_kernels.core.dtypes import no_autocast
from vcpo_kernels.sequence_gradients.graph import Graph
from vcpo_kernels.sequence_gradients.row_owners import RowOwners

CHECKS = ("auto", "always", "never")
WIDTH = 8  # of the random projections that rows are compared by, so that none is kept whole

_seen_right: weakref.WeakKeyDictionary[nn.Module, set[tuple[int, bool]]] = weakref.WeakKeyDictionary()


def key_of(graph: Graph, owners: RowOwners) -> tuple[int, bool] | None:
    """What one probe speaks for: graphs alike, of padded batches in which the code alone decides where rows go. None: for itself.

    In packed and indexed batches data keeps sequences apart: a mask of the attention, position ids, cu_seqlens.
    """
    if not owners.equal or not graph.fixed:
        return None
    assert owners.segments.shape is not None
    batch, length = owners.segments.shape
    return graph.fingerprint, batch == length


def is_needed(check: str, model: nn.Module, key: tuple[int, bool] | None, sequences: int) -> bool:
    """Whether to run the probe. A single sequence has nobody to be taken for."""
    if check == "never" or sequences < 2:
        return False
    return check == "always" or key is None or key not in _seen_right.get(model, ())


def remember(model: nn.Module, key: tuple[int, bool] | None) -> None:
    """The probe found nothing."""
    if key is not None:
        _seen_right.setdefault(model, set()).add(key)


def weightings(batch: int, exponents: range) -> list[Tensor]:
    """u [B] of each round, 2 to one of `exponents`: any two sequences differ in one round (the digits of their numbers)."""
    rounds, digits = [], torch.arange(batch)
    while not rounds or bool(digits.any()):
        rounds.append(torch.exp2((exponents.start + digits % len(exponents) * exponents.step).double()))
        digits = digits // len(exponents)
    return rounds


@dataclass
class Probe:
    """One batch's. Every backward tells `see` of each row's gradient at each site; then `verdict`."""

    weights: list[Tensor]  # of the rounds
    epsilon: float  # of the coarsest dtype that carries a gradient
    _round: int | None = None  # None: the backward from ones
    _rows: list[dict[str, list[Tensor]]] = field(init=False)
    _next: dict[str, int] = field(default_factory=dict)
    _found: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # by site: off, size, each [B]

    def __post_init__(self) -> None:
        self._rows = [{} for _ in self.weights]

    @staticmethod
    def of(graph: Graph, like: Tensor) -> Probe:
        """like: per_sequence. Down is safe but in fp16, which has no digits to spare below: there up, and not far."""
        exponents = range(4) if torch.float16 in graph.dtypes else range(0, -32, -1)
        weights = [u.to(like) for u in weightings(len(like), exponents)]
        return Probe(weights, max(torch.finfo(d).eps for d in graph.dtypes if d.is_floating_point))

    @property
    def weighs(self) -> bool:
        """Whether a round is running: nothing but the probe is to look at its gradients."""
        return self._round is not None

    def rounds(self) -> Iterator[Tensor]:
        """What to start each round's backward from. The backward from ones comes after the last."""
        for k, u in enumerate(self.weights):
            self._round = k
            yield u
        self._round = None

    def see(self, site: str, owners: RowOwners, grad: Tensor) -> None:
        """grad [*lead, d] at `site`, of the running backward. Sites come in one order in all of them."""
        spans, (rows,) = owners.by_sequence(site, _projected(grad))
        rows = rows.double()
        if self._round is not None:
            u = self.weights[self._round].to(rows)
            self._rows[self._round].setdefault(site, []).append(rows / u[spans.owners()][:, None])
            return
        k = self._next[site] = self._next.get(site, -1) + 1
        size = spans.sums(rows.square()).sum(1)
        off = torch.stack([spans.sums((of[site][k] - rows).square()).sum(1) for of in self._rows])
        self._found.setdefault(site, []).append((off.amax(0), size))

    def verdict(self) -> list[tuple[str, int, float]]:
        """Sites whose rows carry other sequences' gradients, from the loss on: name, the worst sequence, its relative error.

        Reads the device once. What is not finite says nothing: where ones gave it, it shows in the norms by itself.
        """
        sites = [(site, *pair) for site, pairs in self._found.items() for pair in pairs]
        if not sites:
            return []
        device = self.weights[0].device
        off, size = (torch.stack([s[k].to(device, torch.float64) for s in sites]) for k in (1, 2))
        tolerance, noise = self._tolerances(device)
        bound = tolerance**2 * size + noise**2 * size.amax(0)
        bad = ((off > bound) & off.isfinite()).any(1)
        if not bool(bad.any()):
            return []
        error = (off / torch.maximum(off, size)).nan_to_num(0.0).sqrt()
        worst, which = error.max(1)
        return [(sites[k][0], int(which[k]), float(worst[k])) for k in bad.nonzero()[:, 0].tolist()]

    def _tolerances(self, device: torch.device) -> tuple[float, float]:
        """Relative to a site's gradient, and to the sequence's largest at any site (where sums cancel, noise is all there is).

        A CPU adds in one order, so that only what fp16 loses below its range differs. A GPU's atomic additions have no order:
        a rounding a layer, and never more than half the digits.
        """
        if device.type == "cpu" and self.epsilon != torch.finfo(torch.float16).eps:
            return min(4 * self.epsilon, self.epsilon**0.5), 0.0
        return min(1024 * self.epsilon, self.epsilon**0.5), self.epsilon


def _projected(grad: Tensor) -> Tensor:
    """grad [.., d] times d random signs, WIDTH times over, scaled by a power of two to the size of an entry: [.., WIDTH]."""
    width = grad.shape[-1]
    if width <= WIDTH:
        return grad
    generator = torch.Generator().manual_seed(width)
    signs = torch.randint(0, 2, (width, WIDTH), generator=generator).mul_(2).sub_(1)
    scale = 2.0 ** -((width - 1).bit_length() // 2)
    with no_autocast(grad):
        return grad @ (signs * scale).to(grad)
