"""The probe: whether each row's gradient is that of its own sequence's scalar, whatever the shapes look like.

Layer: sequences. A backward is linear in what it starts from. Started from u_i in the place of 1, a row that depends on
sequence i alone has u_i times its gradient; one that belongs to another sequence, or to several, has not. With powers of two
for u that holds to the bit in every dtype, but for what a GPU adds up in another order. Rows without a gradient say nothing
and add nothing to any norm.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vcpo_kernels.core.checks import Check
from vcpo_kernels.core.dtypes import no_autocast
from vcpo_kernels.parallel import collectives
from vcpo_kernels.rows.kept_logits import logits_kept
from vcpo_kernels.sequence_gradients.graph import Graph
from vcpo_kernels.sequence_gradients.row_owners import RowOwners

CHECKS = ("auto", "always", "never")
WIDTH = 8  # of the random projections that rows are compared by, so that none is kept whole

_seen_right: weakref.WeakKeyDictionary[nn.Module, set[tuple[int, bool]]] = weakref.WeakKeyDictionary()


def key_of(graph: Graph, owners: RowOwners) -> tuple[int, bool] | None:
    """What one probe speaks for: graphs alike, of padded batches where the code alone decides where rows go. None: itself.

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


def exponents_of(graph: Graph) -> range:
    """Down is safe but in fp16, which has no digits to spare below: there up, and not far."""
    return range(4) if torch.float16 in graph.dtypes else range(0, -32, -1)


def rounds(check: str, model: nn.Module, key: tuple[int, bool] | None, graph: Graph, sequences: int) -> int:
    """How many backwards the probe is to take; 0 where none is needed."""
    return len(weightings(sequences, exponents_of(graph))) if is_needed(check, model, key, sequences) else 0


def weightings(batch: int, exponents: range, least: int = 1) -> list[Tensor]:
    """u [B] of each round, 2 to one of `exponents`: any two sequences differ in one round (the digits of their numbers).

    least: as many rounds as other ranks take, whose backwards this one takes part in.
    """
    rounds: list[Tensor] = []
    digits = torch.arange(batch, device="cpu")
    while len(rounds) < least or bool(digits.any()):
        rounds.append(torch.exp2((exponents.start + digits % len(exponents) * exponents.step).double()))
        digits = digits // len(exponents)
    return rounds


class _Site(NamedTuple):
    """Of one call of a module, each [B]: the sequence's worst row relative to its scale, its largest difference, its mean row.

    Squared. A row's scale is its own gradient's size and the sequence's mean: where sums cancel, noise is all there is.
    """

    excess: Tensor
    off: Tensor
    mean: Tensor


@dataclass
class Probe:
    """One batch's. Every backward tells `see` of each row's gradient at each site; then `verdict`."""

    weights: list[Tensor]  # of the rounds
    epsilon: float  # of the coarsest dtype that carries a gradient
    _round: int | None = None  # None: the backward from ones
    _rows: list[dict[str, list[Tensor]]] = field(init=False)
    _found: dict[str, list[_Site]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows = [{} for _ in self.weights]

    @staticmethod
    def of(graph: Graph, like: Tensor, rounds: int = 1) -> Probe:
        """like: per_sequence. rounds: at least."""
        weights = [u.to(like) for u in weightings(len(like), exponents_of(graph), rounds)]
        return Probe(weights, max(torch.finfo(d).eps for d in graph.dtypes if d.is_floating_point))

    @property
    def weighs(self) -> bool:
        """Whether a round is running: nothing but the probe is to look at its gradients."""
        return self._round is not None

    def run_rounds(self, check: Check, per_sequence: Tensor, graph: Graph) -> None:
        """The backwards before the one from ones."""
        with logits_kept(), graph.leaves_untouched():
            for k, u in enumerate(self.weights):
                self._round = k
                try:
                    per_sequence.backward(u, retain_graph=True)
                except RuntimeError as error:
                    if "donated buffer" not in str(error):
                        raise
                    raise check.runtime_error(
                        "a compiled function behind per_sequence frees what a second backward needs, and the probe is one. "
                        "Call it uncompiled, set torch._functorch.config.donated_buffer = False before it is compiled, or, "
                        "where rows are known to be in the batch's order, make SequenceGradients(model, check='never')."
                    ) from error
        self._round = None

    def see(self, site: str, owners: RowOwners, grad: Tensor) -> None:
        """grad [*lead, d] at `site`, of the running backward. Sites come in one order in all of them."""
        spans, (rows,) = owners.by_sequence(site, _projected(grad))
        rows = rows.double()
        if self._round is not None:
            u = self.weights[self._round].to(rows)
            self._rows[self._round].setdefault(site, []).append(rows / u[spans.owners()][:, None])
            return
        calls = self._found.setdefault(site, [])
        differences = torch.stack([of[site][len(calls)] - rows for of in self._rows])
        off = torch.where(differences.isfinite(), differences, 0.0).square().sum(2).amax(0)
        size = rows.square().sum(1)
        mean = spans.sums(size[:, None])[:, 0] / torch.diff(spans.offsets).clamp(min=1)
        excess = (off / (size + mean[spans.owners()])).nan_to_num(0.0)
        calls.append(_Site(spans.largest(excess), spans.largest(off), mean))

    def raise_if_mixed(self, check: Check, groups: list[Any]) -> None:
        """RuntimeError where rows carry other sequences' gradients, on all ranks of `groups` where it is on one."""
        found = self.verdict()
        elsewhere = torch.tensor(float(bool(found)), device=self.weights[0].device)
        for group in groups:
            elsewhere = collectives.largest(elsewhere, group)
        if not found and groups and bool(elsewhere):
            raise check.runtime_error(
                "another rank that works on these sequences has found rows that carry other sequences' gradients: its error "
                "says where."
            )
        if not found:
            return
        site, sequence, error = found[0]
        others = f" (and of {len(found) - 1} more modules)" if len(found) > 1 else ""
        half = self.epsilon == torch.finfo(torch.float16).eps
        lost = " Or its fp16 gradients underflow: use bfloat16, or scale per_sequence up." if half else ""
        raise check.runtime_error(
            f"in the output gradient of {site}{others}, the rows of sequence {sequence} do not carry the gradient of "
            f"per_sequence[{sequence}] alone (off by {error:.1%}). Either per_sequence[i] depends on other sequences' tokens "
            "(a mean over the batch, a token predicted across a boundary of packed sequences), or the model reorders or mixes "
            "rows inside: time-major or sorted activations, batch statistics, attention from one sequence to another. Keep "
            "them in the batch's order and apart, or, where parameters are whole, use OPOBAccumulator, one sequence at a time."
            + lost
        )

    def verdict(self) -> list[tuple[str, int, float]]:
        """Sites whose rows carry other sequences' gradients, from the loss on: name, the worst sequence, its relative error.

        Reads the device once. What is not finite says nothing: where ones gave it, it shows in the norms by itself.
        """
        names = [name for name, calls in self._found.items() for _ in calls]
        if not names:
            return []
        device = self.weights[0].device
        calls = [call for calls in self._found.values() for call in calls]
        excess, off, mean = (torch.stack([part.to(device) for part in parts]) for parts in zip(*calls, strict=True))
        tolerance, noise = self._tolerances(device)
        bad = (excess > tolerance**2) & (off > noise**2 * mean.nan_to_num(0.0).amax(0))
        worst, which = torch.where(bad, excess, 0.0).max(1)
        found = zip(names, which.tolist(), worst.sqrt().clamp(max=1).tolist(), strict=True)
        return [of_site for of_site in found if of_site[2]]

    def _tolerances(self, device: torch.device) -> tuple[float, float]:
        """Relative to a row's scale, and to the sequence's mean row at any site.

        A CPU adds in one order: nothing is left to differ but what fp16 loses below its range. A GPU's atomic additions have
        none, and each layer rounds once.
        """
        if device.type == "cpu" and self.epsilon != torch.finfo(torch.float16).eps:
            return min(64 * self.epsilon, 2.0**-6), 0.0
        return min(1024 * self.epsilon, 2.0**-4), self.epsilon


def _projected(grad: Tensor) -> Tensor:
    """grad [.., d] times d random signs, WIDTH times over, scaled by a power of two to the size of an entry: [.., WIDTH]."""
    width = grad.shape[-1]
    if width <= WIDTH:
        return grad
    generator = torch.Generator("cpu").manual_seed(width)
    signs = torch.randint(0, 2, (width, WIDTH), generator=generator, device="cpu").mul_(2).sub_(1)
    scale = 2.0 ** -((width - 1).bit_length() // 2)
    with no_autocast(grad):
        return grad @ (signs * scale).to(grad)
