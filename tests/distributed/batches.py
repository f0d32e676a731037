"""One batch, split over data and sequence ranks in every way, and its loss on one device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import vcpo_kernels as vk
from tests.distributed import counting
from vcpo_kernels import objectives

B, T, V = 8, 6, 11


@dataclass(frozen=True)
class Layout:
    """data, sequence: how many ranks. rows: of each data rank; None: equal parts. groups: an int, or ids of the step."""

    data: int
    sequence: int
    rows: tuple[int, ...] | None = None
    groups: int | tuple[int, ...] = 2
    config: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False

    def rows_of(self, rank: int) -> slice:
        counts = self.rows or (B // self.data,) * self.data
        start = sum(counts[:rank])
        return slice(start, start + counts[rank])


SPLIT = (0, 1, 2, 3, 0, 1, 2, 3)  # every group has a sequence in each half, and in each quarter of two
LAYOUTS: dict[str, dict[str, Layout]] = {
    "2": {
        "dp2": Layout(2, 1),
        "dp2, split groups": Layout(2, 1, groups=SPLIT),
        "dp2, uneven": Layout(2, 1, rows=(6, 2)),
        "dp2, an empty rank": Layout(2, 1, rows=(0, 8), groups=SPLIT),
        "dp2, averaged": Layout(2, 1, averaged=True),
        "cp2": Layout(1, 2),
        "cp2, token mean": Layout(1, 2, config={"aggregation": "token-mean", "baseline_weighting": "estimator"}),
        "cp2, fixed length": Layout(1, 2, config={"aggregation": "seq-mean-token-sum-norm", "max_tokens": float(T)}),
    },
    "4": {
        "dp4, split groups": Layout(4, 1, groups=SPLIT),
        "dp4, uneven": Layout(4, 1, rows=(3, 0, 4, 1), groups=SPLIT),
        "dp2 x cp2": Layout(2, 2, averaged=True),
        "dp2 x cp2, split groups": Layout(2, 2, groups=SPLIT, config={"max_weight": None, "normalize_std": True}),
        "cp4, split groups": Layout(1, 4, groups=SPLIT, config={"ess_max_weight": 2.0}),
    },
}


def whole() -> dict[str, Tensor]:
    """A batch with a sequence without tokens, one that only the first half of T has tokens of, a broken one."""
    torch.manual_seed(0)
    logits, ids = torch.randn(B, T, V) * 2, torch.randint(0, V, (B, T))
    mask = torch.rand(B, T) < 0.8
    mask[2], mask[5, 3:] = False, False
    mu = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0] + 0.3 * torch.randn(B, T)
    mu[6, 1], mask[6, 1] = float("nan"), True
    return {"logits": logits, "ids": ids, "mask": mask, "mu": mu, "rewards": torch.rand(B)}


def config_of(layout: Layout) -> vk.VCPOConfig:
    return vk.VCPOConfig(**layout.config)


def groups_of(layout: Layout, rows: slice = slice(None)) -> int | Tensor:
    return layout.groups if isinstance(layout.groups, int) else torch.tensor(layout.groups)[rows]


def on_one_device(layout: Layout) -> tuple[vk.VCPOOutput, Tensor]:
    """The loss of the whole batch, and d logits."""
    x = whole()
    logits = x["logits"].clone().requires_grad_()
    stats = vk.token_stats(logits, x["ids"], x["mask"])
    out = vk.vcpo_loss(
        stats, x["mu"], x["rewards"], groups_of(layout), vk.Segments.padded(x["mask"]), config_of(layout)
    )
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


def on_rank(rank: int, names: str) -> dict[str, dict[str, Any]]:
    """Every layout of LAYOUTS[names] on this rank: its part of the batch, its results and how they were communicated."""
    return {**{name: _run(layout) for name, layout in LAYOUTS[names].items()}, **_refusals()}


def _refusals() -> dict[str, Any]:
    world = dist.group.WORLD
    x, ids = whole(), torch.tensor([0, 1, 2, 3, 0, 1, 2, -1])
    stats = vk.token_stats(x["logits"], x["ids"], x["mask"], shift=True)
    split = vk.Segments.padded(x["mask"], sequence_group=world)
    plain, unshifted = vk.Segments.padded(x["mask"]), vk.token_stats(x["logits"], x["ids"], x["mask"])

    def loss(segments: vk.Segments, **ranks: Any) -> Any:
        return vk.vcpo_loss(stats, x["mu"], x["rewards"], 2, segments, **ranks)

    shifted = {
        "vcpo_loss": lambda: loss(split),
        "reinforce": lambda: objectives.reinforce(stats, x["mu"], x["rewards"], split),
        "sequence_log_weights": lambda: vk.sequence_log_weights(stats, x["mu"], split),
        "sum": lambda: split.sum(stats.logp),
        "seen_by": lambda: split.seen_by(stats),
    }
    rewards = x["rewards"]
    return {
        "shifted": {name: message_of(call) for name, call in shifted.items()},
        "wrong ids": message_of(
            lambda: vk.vcpo_loss(unshifted, x["mu"], rewards, ids, plain, ranks=vk.Ranks(sequence=None, data=None))
        ),
        "unaware": message_of(lambda: loss(plain, ranks=vk.Ranks(sequence=world))),
    }


def message_of(call: Callable[[], Any]) -> str:
    """Of the TypeError or ValueError that it raises."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@dataclass(frozen=True)
class Part:
    """This rank's of the batch: rows and tokens, tensors by name, ranks and segments."""

    rows: slice
    tokens: slice
    x: dict[str, Tensor]
    ranks: vk.Ranks
    segments: vk.Segments


def part_of(layout: Layout) -> Part:
    mesh = init_device_mesh("cpu", (layout.data, layout.sequence), mesh_dim_names=("dp", "cp"))
    uneven = layout.rows is not None
    ranks = vk.Ranks.of(mesh, averaged=layout.averaged, uneven=uneven)
    columns = T // layout.sequence if T % layout.sequence == 0 else -(-T // layout.sequence)
    s = mesh.get_local_rank("cp")
    rows, tokens = layout.rows_of(mesh.get_local_rank("dp")), slice(s * columns, (s + 1) * columns)
    x = {k: v[rows] if k == "rewards" else v[rows, tokens].contiguous() for k, v in whole().items()}
    return Part(rows, tokens, x, ranks, vk.Segments.padded(x["mask"], sequence_group=ranks.sequence))


def advantages_of(
    rewards: Tensor, groups: int | Tensor, lengths: Tensor, log_weights: Tensor, norms: Tensor, ranks: vk.Ranks | None
) -> dict[str, Tensor]:
    """By every function that has groups, where one sequence has no tokens and one is broken."""
    valid = lengths > 0
    return {
        "mean": objectives.group_mean_advantages(rewards, groups, valid=valid, ranks=ranks),
        "normalized": objectives.group_normalized_advantages(
            rewards, groups, sample_std=True, valid=valid, ranks=ranks
        ),
        "leave one out": objectives.leave_one_out_advantages(rewards, groups, valid=valid, ranks=ranks),
        "length": objectives.length_weighted_advantages(rewards, groups, lengths, ranks=ranks),
        "opob": objectives.opob_advantages(rewards, groups, log_weights, norms, valid=valid, ranks=ranks),
    }


def _run(layout: Layout) -> dict[str, Any]:
    part = part_of(layout)
    rows, tokens, x, ranks, segments = part.rows, part.tokens, part.x, part.ranks, part.segments
    logits = x["logits"].requires_grad_()
    stats = vk.token_stats(logits, x["ids"], x["mask"])
    with counting.collectives() as called:
        out = vk.vcpo_loss(
            stats, x["mu"], x["rewards"], groups_of(layout, rows), segments, config_of(layout), ranks=ranks
        )
    out.loss.backward()
    norms = segments.sum(stats.score_sqnorm)
    ess = vk.effective_sample_size(out.log_weights, segments.lengths > 0, ranks=ranks)
    baselines = vk.off_policy_baseline(x["rewards"], out.log_weights, norms, groups_of(layout, rows), ranks=ranks)
    lengths = segments.lengths
    with counting.collectives() as of_advantages:
        advantages = advantages_of(x["rewards"], groups_of(layout, rows), lengths, out.log_weights, norms, ranks)
    dist.barrier()
    return {
        "advantages": advantages, "called by advantages": of_advantages,
        "effective_sample_size": ess, "off_policy_baseline": baselines,
        "rows": rows, "tokens": tokens, "called": called, "grad": logits.grad,
        "out": {name: value for name, value in vars(out).items() if isinstance(value, Tensor)},
        "loss": out.loss.detach(), "metrics": out.metrics, "lengths": lengths,
        "mean": segments.mean(x["rewards"][:, None].expand(x["mask"].shape).contiguous()),
    }  # fmt: skip


OF_OBJECTIVES = {
    "2": ("dp2, uneven", "dp2, averaged", "cp2"),
    "4": ("dp2 x cp2", "dp4, uneven"),
}


def _terms(objective: Any, x: dict[str, Tensor]) -> dict[str, Any]:
    """Every extra term at once: KL, entropy, truncated ESS, a proximal policy where the method takes one."""
    terms: dict[str, Any] = {
        "reference_logp": x["mu"].nan_to_num(-2.0) - 0.1, "kl_coefficient": 0.1, "entropy_coefficient": 0.01,
        "ess_max_weight": 2.0, "max_tokens": float(T),
    }  # fmt: skip
    if "proximal_logp" in objective.proximal_terms:
        terms["proximal_logp"] = x["mu"].nan_to_num(-2.0) + 0.2
    return terms


def objective_loss(objective: Any, x: dict[str, Tensor], logits: Tensor, segments: vk.Segments, **ranks: Any) -> Any:
    stats = vk.token_stats(logits, x["ids"], x["mask"])
    return objective(stats, x["mu"], x["rewards"] - 0.5, segments, **_terms(objective, x), **ranks)


def _methods() -> Iterator[objectives.TokenObjective]:
    for name in objectives.__all__:
        method = getattr(objectives, name)
        if inspect.isclass(method) and issubclass(method, objectives.TokenObjective) and not inspect.isabstract(method):
            yield method()


# Every method that a rank can take part in, with its defaults.
METHODS = {method.name: method for method in _methods() if not method.of_one_rank}


def objectives_on_one_device() -> dict[str, dict[str, Any]]:
    found = {}
    for name, objective in METHODS.items():
        x = whole()
        logits = x["logits"].requires_grad_()
        out = objective_loss(objective, x, logits, vk.Segments.padded(x["mask"]))
        out.loss.backward()
        found[name] = {"out": out, "grad": logits.grad}
    return found


def objectives_on_rank(rank: int, names: str) -> dict[str, dict[str, Any]]:
    """Every objective in the layouts of OF_OBJECTIVES[names]: (layout, objective) -> results."""
    found = {}
    for layout in OF_OBJECTIVES[names]:
        part = part_of(LAYOUTS[names][layout])
        for name, objective in METHODS.items():
            logits = part.x["logits"].detach().clone().requires_grad_()
            with counting.collectives() as called:
                out = objective_loss(objective, part.x, logits, part.segments, ranks=part.ranks)
            out.loss.backward()
            found[f"{layout}: {name}"] = {
                "rows": part.rows, "tokens": part.tokens, "called": called, "grad": logits.grad,
                "loss": out.loss.detach(), "metrics": out.metrics, "ess_moments": out.ess_moments,
                "log_weights": out.log_weights, "coefficients": out.coefficients,
            }  # fmt: skip
    return found
