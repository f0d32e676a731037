"""Calls over ranks in compiled functions, and the same calls as they are: results, gradients, and collectives of the graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import vcpo_kernels as vk
from tests.distributed import batches, vocabularies
from tests.distributed.batches import LAYOUTS, METHODS, Layout, Part, config_of, groups_of, part_of
from tests.distributed.vocabularies import HEADS, HeadCase
from vcpo_kernels import objectives
from vcpo_kernels.core.trees import TensorTree

V, H = 41, 6
Step = Callable[..., Any]


@dataclass
class Graphs:
    """A backend of torch.compile that runs graphs as they are and remembers the collectives of each, in their order."""

    forward: list[list[str]] = field(default_factory=list)
    backward: list[list[str]] = field(default_factory=list)

    def backend(self) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def into(graphs: list[list[str]]) -> Any:
            def compiler(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
                names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
                graphs.append([n.split(".")[1] for n in names if n.startswith("_c10d_functional") and "wait" not in n])
                return make_boxed_func(graph.forward)

            return compiler

        return aot_autograd(fw_compiler=into(self.forward), bw_compiler=into(self.backward))


def tensors_of(value: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors inside, by where they are."""
    if isinstance(value, Tensor):
        return {name: (value.to_local() if isinstance(value, DTensor) else value).detach()}  # type: ignore[no-untyped-call]
    if isinstance(value, TensorTree):
        value = vars(value)
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    parts = value.items() if isinstance(value, dict) else ()
    return {at: t for key, part in parts for at, t in tensors_of(part, f"{name}.{key}").items()}


def differences(step: Step, compiled: Step, arguments: Callable[[], list[Any]]) -> list[float]:
    """The largest of each result's and gradient's; of step(*arguments) the first result is the loss. Relative to 1 or more.

    A compiled function may have further metrics, of what it cannot check.
    """
    found = []
    for function in (step, compiled):
        given = arguments()
        leaves = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
        loss, *others = function(*given)
        found.append(tensors_of([loss, others, torch.autograd.grad(loss, leaves)]))
    apart = []
    for name, one in found[0].items():
        two = found[1][name]
        assert torch.equal(one.isnan(), two.isnan()), name
        one, two = one.nan_to_num(7.0).double(), two.nan_to_num(7.0).double()
        apart.append(((one - two).abs() / (1 + one.abs())).max().item() if one.numel() else 0.0)
    return apart


# --- shards of a vocabulary ------------------------------------------------------------------------------------------


def _shards(rank: int) -> dict[str, Any]:
    """Every function with a shard in one graph, of batches and temperatures that change; shards uneven, the last one padded."""
    shard = vk.VocabularyShard(dist.group.WORLD, (0, 7)[rank], V)
    entries = (slice(0, 7), slice(7, 43))[rank]

    def step(
        hidden: Tensor, weight: Tensor, bias: Tensor, logits: Tensor, ids: Tensor, g: Tensor, mask: Tensor, t: float
    ) -> Any:
        told: dict[str, Any] = {"mask": mask, "temperature": t, "shift": True, "vocabulary": shard}
        stats = vk.linear_token_stats(hidden * 1, weight, ids, bias, memory="fast", **told)
        known, _ = vk.linear_weighted_logp(hidden * 1, weight, ids, g, bias, chunk_bytes=900, **told)
        of_logits, others = vk.weighted_logp(logits * 1, ids, g, **told)
        return (stats.logp * g).sum() + known + of_logits, stats.logp, stats.score_sqnorm, others.entropy

    graphs = Graphs()
    compiled = torch.compile(step, fullgraph=True, backend=graphs.backend(), dynamic=True)
    apart = []
    for count, temperature in ((3, 0.9), (5, 0.7)):

        def arguments(count: int = count, temperature: float = temperature) -> list[Any]:
            torch.manual_seed(count)
            weight, bias = torch.randn(43, H)[entries].clone(), torch.randn(43)[entries].clone()
            logits = torch.randn(count, 4, 43)[..., entries].clone()
            leaves = [t.requires_grad_() for t in (torch.randn(count, 4, H), weight, bias, logits)]
            ids, g = torch.randint(0, V, (count, 4)), torch.randn(count, 4)
            return [*leaves, ids, g, torch.rand(count, 4) < 0.7, temperature]

        apart += differences(step, compiled, arguments)
    return {"differences": apart, "forward": graphs.forward, "backward": graphs.backward}


def _head(head: HeadCase, rank: int, backend: Any) -> list[float]:
    case, x = head.case, vocabularies.whole_head(head)
    entries = case.entries(2)[rank]
    shard = vk.VocabularyShard(dist.group.WORLD, entries.start, case.size)
    more = max(0, entries.stop - case.size)
    mask = x["mask"] if case.masked else None

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, g: Tensor, h: Tensor) -> Any:
        told = {"bias": bias if head.bias else None, "mask": mask, "vocabulary": shard, **case.settings}
        given = hidden * 1
        stats = vk.linear_token_stats(given, weight, x["ids"], memory=head.memory, chunk_bytes=head.chunk_bytes, **told)
        known, _ = vk.linear_weighted_logp(given, weight, x["ids"], g, chunk_bytes=head.chunk_bytes, **told)
        loss = (stats.logp * g).sum() + ((stats.entropy * h).sum() if case.entropy else 0) + known
        return loss + 0 * bias.sum(), stats.logp, stats.entropy, stats.score_sqnorm, stats.lse

    def arguments() -> list[Any]:
        weight = torch.nn.functional.pad(x["weight"], (0, 0, 0, more), value=100.0)[entries]
        bias = torch.nn.functional.pad(x["bias"], (0, more), value=100.0)[entries]
        leaves = [t.clone().requires_grad_(not head.frozen) for t in (weight, bias)]
        return [x["hidden"].clone().requires_grad_(), *leaves, x["g"], x["h"]]

    return differences(step, torch.compile(step, fullgraph=True, backend=backend), arguments)


def _dtensors() -> list[float]:
    """Logits, and a head beside its hidden states, whose shards nobody names."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    whole = (torch.randn(3, 4, V), torch.randn(3, 4, H), torch.randn(V, H))
    placements = (Shard(2), Replicate(), Shard(0))
    ids = torch.randint(0, V, (3, 4))

    def step(logits: Tensor, hidden: Tensor, weight: Tensor) -> Any:
        of_logits, of_head = vk.token_stats(logits, ids), vk.linear_token_stats(hidden, weight, ids)
        return (of_logits.logp + of_head.entropy * of_head.logp).sum(), of_logits.logp, of_head.entropy

    def arguments() -> list[Any]:
        return [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(whole, placements, strict=True)]

    return differences(step, torch.compile(step, fullgraph=True, backend="aot_eager"), arguments)


# --- data and sequence ranks -----------------------------------------------------------------------------------------


def _vcpo(layout: Layout, part: Part, x: dict[str, Tensor], segments: vk.Segments) -> tuple[Any, ...]:
    groups = groups_of(layout, part.rows)
    stats = vk.token_stats(x["logits"] * 1, x["ids"], x["mask"])
    out = vk.vcpo_loss(stats, x["mu"], x["rewards"], groups, segments, config_of(layout), ranks=part.ranks)
    ess = vk.effective_sample_size(out.log_weights, segments.lengths > 0, ranks=part.ranks)
    norms = segments.sum(stats.score_sqnorm)
    baselines = vk.off_policy_baseline(x["rewards"], out.log_weights, norms, groups, ranks=part.ranks)
    return out.loss, out, ess, baselines, segments.lengths, segments.mean(x["mu"])


def _segments(part: Part, x: dict[str, Tensor]) -> vk.Segments:
    return vk.Segments.padded(x["mask"], sequence_group=part.ranks.sequence)


def _leaves_of(part: Part) -> dict[str, Tensor]:
    return {**part.x, "logits": part.x["logits"].detach().clone().requires_grad_()}


def _steps(rank: int) -> dict[str, Any]:
    """Data ranks and sequence ranks in one graph, with a method that weighs whole sequences."""
    by_rows, by_tokens = LAYOUTS["2"]["dp2, split groups"], LAYOUTS["2"]["cp2"]
    data, sequence = part_of(by_rows), part_of(by_tokens)

    def step(of_data: Any, of_sequence: Any, segments: vk.Segments, first: Tensor, second: Tensor) -> Any:
        x, y = {**of_data, "logits": first}, {**of_sequence, "logits": second}
        loss, *results = _vcpo(by_rows, data, x, _segments(data, x))
        split, *of_split = _vcpo(by_tokens, sequence, y, segments)
        gspo = batches.objective_loss(objectives.GSPO(), y, second * 1, segments, ranks=sequence.ranks)
        return loss + split + gspo.loss, results, of_split, gspo

    def arguments() -> list[Any]:
        x, y = _leaves_of(data), _leaves_of(sequence)
        return [x, y, sequence.segments, x.pop("logits"), y.pop("logits")]

    graphs = Graphs()
    apart = differences(step, torch.compile(step, fullgraph=True, backend=graphs.backend()), arguments)
    return {"differences": apart, "forward": graphs.forward, "backward": graphs.backward}


def _layout(layout: Layout, backend: Any) -> list[float]:
    part = part_of(layout)

    def step(x: dict[str, Tensor], logits: Tensor) -> Any:
        return _vcpo(layout, part, {**x, "logits": logits}, _segments(part, x))

    def arguments() -> list[Any]:
        x = _leaves_of(part)
        return [x, x.pop("logits")]

    return differences(step, torch.compile(step, fullgraph=True, backend=backend, dynamic=True), arguments)


def _batches(name: str) -> list[float]:
    """Of sizes that change, in one graph; the ranks are an argument."""
    part = part_of(LAYOUTS["2"][name])

    def step(x: dict[str, Tensor], told: vk.Ranks, logits: Tensor) -> Any:
        stats = vk.token_stats(logits * 1, x["ids"], x["mask"])
        segments = vk.Segments.padded(x["mask"], sequence_group=told.sequence)
        out = vk.vcpo_loss(stats, x["mu"], x["rewards"], 2, segments, ranks=told)
        return out.loss, out

    graphs = Graphs()
    compiled = torch.compile(step, fullgraph=True, backend=graphs.backend(), dynamic=True)
    apart = []
    for count in (len(part.x["mask"]), len(part.x["mask"]) // 2):  # never one group, which is a graph of its own

        def arguments(count: int = count) -> list[Any]:
            x = {name: t.detach()[:count].clone() for name, t in part.x.items()}
            return [x, part.ranks, x.pop("logits").requires_grad_()]

        apart += differences(step, compiled, arguments)
    assert len(graphs.forward) == 1
    return apart


def _ragged(kind: str, rank: int) -> list[float]:
    """Sequences of several lengths, half of each on either rank."""
    group, lengths = dist.group.WORLD, torch.tensor([2, 0, 3])
    owner = torch.repeat_interleave(torch.arange(3), lengths)
    where = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) if kind == "packed" else owner

    def step(logits: Tensor, where: Tensor, ids: Tensor, mu: Tensor, rewards: Tensor) -> Any:
        if kind == "packed":
            segments = vk.Segments.packed(where, sequence_group=group)
        else:
            segments = vk.Segments.indexed(where, 3, sequence_group=group)
        out = vk.vcpo_loss(vk.token_stats(logits * 1, ids), mu, rewards, 3, segments)
        return out.loss, out, segments.lengths, segments.mean(mu)

    def arguments() -> list[Any]:
        torch.manual_seed(rank)
        logits, ids = torch.randn(5, V).requires_grad_(), torch.randint(0, V, (5,))
        return [logits, where, ids, torch.randn(5) - 5, torch.tensor([1.0, 0.0, 0.5])]

    return differences(step, torch.compile(step, fullgraph=True, backend="aot_eager"), arguments)


def _objective(name: str, layout: str) -> list[float]:
    part = part_of(LAYOUTS["2"][layout])

    def step(x: dict[str, Tensor], logits: Tensor) -> Any:
        out = batches.objective_loss(METHODS[name], x, logits * 1, part.segments, ranks=part.ranks)
        return out.loss, out

    def arguments() -> list[Any]:
        x = _leaves_of(part)
        return [x, x.pop("logits")]

    return differences(step, torch.compile(step, fullgraph=True, backend="aot_eager"), arguments)


def _uneven(fullgraph: bool) -> list[float] | str:
    """Refused where a graph may not break; elsewhere run as it is."""
    layout = LAYOUTS["2"]["dp2, uneven"]
    part = part_of(layout)

    def step(x: dict[str, Tensor], logits: Tensor) -> Any:
        return _vcpo(layout, part, {**x, "logits": logits}, _segments(part, x))

    def arguments() -> list[Any]:
        x = _leaves_of(part)
        return [x, x.pop("logits")]

    compiled = torch.compile(step, fullgraph=fullgraph, backend="eager")
    try:
        return differences(step, compiled, arguments)
    except RuntimeError as error:
        return str(error)


# --- on a rank -------------------------------------------------------------------------------------------------------

EVEN = tuple(name for name, layout in LAYOUTS["2"].items() if layout.rows is None)
OF_INDUCTOR = {"heads": ("auto, small chunks", "lean", "frozen"), "layouts": ("dp2, averaged", "cp2")}


def on_rank(rank: int) -> dict[str, Any]:
    return {"shards": _shards(rank), "steps": _steps(rank), "uneven": _uneven(fullgraph=True)}


def everything_on_rank(rank: int) -> dict[str, Any]:
    """Every mode of the head, layout and objective by itself, and some through inductor."""
    found: dict[str, Any] = {}

    def keep(name: str, call: Callable[..., Any], *arguments: Any) -> None:
        torch._dynamo.reset()
        found[name] = call(*arguments)

    for name, head in HEADS.items():
        if not head.tied:  # which is a sum outside of ours
            keep(f"head, {name}", _head, head, rank, "aot_eager")
    for name in EVEN:
        keep(f"layout, {name}", _layout, LAYOUTS["2"][name], "aot_eager")
    for name in METHODS:
        for layout in ("dp2, averaged", "cp2"):
            keep(f"objective, {name}, {layout}", _objective, name, layout)
    for name in ("dp2", "cp2"):
        keep(f"layout, {name}, of batches that change", _batches, name)
    for name in ("packed", "indexed"):
        keep(f"layout, {name}", _ragged, name, rank)
    keep("uneven", _uneven, False)
    keep("dtensors", _dtensors)
    for name in OF_INDUCTOR["heads"]:
        keep(f"inductor, head, {name}", _head, HEADS[name], rank, "inductor")
    for name in OF_INDUCTOR["layouts"]:
        keep(f"inductor, layout, {name}", _layout, LAYOUTS["2"][name], "inductor")
    return found


def of_four_on_rank(rank: int) -> dict[str, list[float]]:
    """Data and sequence ranks at once."""
    return {name: _layout(LAYOUTS["4"][name], "aot_eager") for name in ("dp2 x cp2", "dp4, split groups")}
