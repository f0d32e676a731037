"""Tensor and sequence parallelism, torch's and transformers': norms, gradients and the fused head are one process's."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import vcpo_kernels as vk
from tests import ranks
from tests.distributed import sharded_models as models
from tests.distributed import shared_models, tensor_parallel_calls
from tests.distributed.counting import collectives
from tests.distributed.shared_models import B, Step, assert_gradients, assert_same
from tests.head import tiny_models

BOUND, HEAD_BOUND = 1e-6, 5e-6
HEADS = ("logits", "fast", "lean")
PLANS = ("hidden layer", "vocabulary", "columns of the table", "sequence parallel", "tied")
FIRST = ("vocabulary", "sequence parallel")  # on two ranks; the others on four
HUGGING_FACE = ("llama", "llama, tied", "qwen3")  # whose norms of heads are not in the plan of the others
FUSED = ("fast", "lean", "weighted_logp")
# Model, head of a plain step, head by sequence: one of each on two ranks; all of them with the slow tests.
SOME = (("llama", "weighted_logp", "lean"), ("llama, tied", "lean", "fast"), ("qwen3", "fast", "logits"))
ALL = tuple((name, fused, head) for name in HUGGING_FACE for fused, head in zip(FUSED, HEADS, strict=True))


def plan_of(name: str) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    table = RowwiseParallel(input_layouts=Replicate())
    if name == "sequence parallel":
        by_tokens = {"output_layouts": Shard(1), "use_local_output": False}
        return {
            "table": RowwiseParallel(input_layouts=Replicate(), **by_tokens),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(**by_tokens),
            "last": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        }
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if name == "vocabulary":
        plan |= {"table": table, "head": ColwiseParallel(use_local_output=False)}
    if name == "columns of the table":
        gathered = ColwiseParallel(output_layouts=Replicate())
        plan |= {"table": gathered, "head": ColwiseParallel(output_layouts=Replicate())}
    return plan


def parallel(name: str, mesh: Any) -> Any:
    """tied: both of the pair are in the plan, and one parameter again."""
    from torch.distributed.tensor.parallel import parallelize_module

    tied = name == "tied"
    model = parallelize_module(shared_models.made(tied), mesh, plan_of("vocabulary" if tied else name))
    if tied:
        model.head.weight = model.table.weight
    return model


# --- transformers ---------------------------------------------------------------------------------------------------------


def hugging_face(name: str, folder: str, plan: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    options = {} if plan is None else {"tp_plan": plan}
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", attn_implementation="eager", **options).train()


def token_batch() -> dict[str, Tensor]:
    x = models.batch("llama")
    return x | {"labels": x["ids"].roll(-1, 1)}


def plain_step(model: Any, head: str) -> dict[str, Any]:
    """A plain backward of logp and entropy."""
    x = token_batch()
    ids, mask, c = x["ids"], x["mask"], x["c"][:, None]
    if head == "weighted_logp":
        with vk.patch_head(model):
            loss, stats = model(ids).weighted_logp(ids, c.expand_as(ids).contiguous(), mask)
    else:
        stats = models.head_stats(model, ids, mask, head)
        loss = (c * stats.logp + 0.1 * stats.entropy).sum()
    loss.backward()
    with torch.no_grad():
        again = models.head_stats(model, ids, mask, "fast").logp
    found = {"logp": stats.logp.detach(), "again": again, "gradients": models.gradients_of(model)}
    return found | {name: getattr(stats, name).detach() for name in ("entropy", "score_sqnorm", "lse")}


# --- the ranks ------------------------------------------------------------------------------------------------------------


def counts(mesh: Any) -> dict[str, list[str]]:
    """The collectives of each method, with the fused head of a sharded vocabulary."""
    x, model, found = shared_models.batch(), parallel("vocabulary", mesh), {}
    segments = vk.Segments.padded(x["mask"])
    with vk.SequenceGradients(model, check="never") as grads:
        stats = Step("fast").stats(model, x["ids"], x["labels"], x["mask"])
        for name, call in (
            ("backward", lambda: grads.backward(segments.sum(stats.logp), segments)),
            ("squared_norms", grads.squared_norms),
            ("accumulate_", lambda: grads.accumulate_(x["c"])),
        ):
            with collectives() as called:
                call()
            found[name] = called
    return found


def on_ranks(rank: int, plans: tuple[str, ...]) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    x = shared_models.batch()
    return {f"{plan}, {head}": Step(head, 2).run(parallel(plan, mesh), x) for plan in plans for head in HEADS}


def on_two(rank: int, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    found = on_ranks(rank, FIRST) | of_hugging_face(rank, folder, SOME)
    return found | {
        "counts": counts(mesh),
        "refused": tensor_parallel_calls.refusals(mesh),
        "plain shard": tensor_parallel_calls.plain_shard(rank),
    }


def of_hugging_face(rank: int, folder: str, cases: tuple[tuple[str, str, str], ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, fused, head in cases:
        model = hugging_face(name, folder, "auto")
        found[f"{name}, {fused}"] = plain_step(model, fused)  # leaves hooks on norms of heads
        found[f"{name}, {head}, by sequence"] = Step(head).run(model, token_batch())
    return found


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as path:
        for name in HUGGING_FACE:
            tiny_models.make(name).save_pretrained(f"{path}/{name}")
        yield path


@pytest.fixture(scope="module")
def of_two(folder: str) -> list[dict[str, Any]]:
    return ranks.run(on_two, 2, folder)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("plan", FIRST)
def test_two_ranks(of_two: list[dict[str, Any]], plan: str, head: str) -> None:
    """Norms and gradients by sequence; the model's replicated parameters count once, whatever its activations are split by."""
    check_plan(of_two, plan, head)


def check_plan(of_ranks: list[dict[str, Any]], plan: str, head: str) -> None:
    want = Step(head).run(shared_models.made(plan == "tied"), shared_models.batch())
    for result in of_ranks:
        got = result[f"{plan}, {head}"]
        assert_same(got, want, BOUND)
        for name, norms in of_ranks[0][f"{plan}, {head}"]["norms"].items():
            assert torch.equal(got["norms"][name], norms), name


def check_hugging_face(of_ranks: list[dict[str, Any]], folder: str, case: tuple[str, str, str]) -> None:
    name, fused, head = case
    model = hugging_face(name, folder, None)
    plain, by_sequence = plain_step(model, fused), Step(head).run(model, token_batch())
    for result in of_ranks:
        got = result[f"{name}, {fused}"]
        for field in plain.keys() - {"gradients"}:
            torch.testing.assert_close(got[field], plain[field], atol=HEAD_BOUND, rtol=HEAD_BOUND)
        assert_gradients(got["gradients"], plain["gradients"], HEAD_BOUND)
        assert_same(result[f"{name}, {head}, by sequence"], by_sequence, BOUND)


@pytest.mark.parametrize("case", SOME)
def test_transformers_plan(of_two: list[dict[str, Any]], folder: str, case: tuple[str, str, str]) -> None:
    """tp_plan="auto", whose head gathers its logits, and without gradients works on a local part of the weight."""
    check_hugging_face(of_two, folder, case)


@pytest.fixture(scope="module")
def of_every_model(folder: str) -> list[dict[str, Any]]:
    return ranks.run(of_hugging_face, 2, folder, ALL)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_transformers_plan_in_every_mode(
    of_every_model: list[dict[str, Any]], folder: str, case: tuple[str, str, str]
) -> None:
    check_hugging_face(of_every_model, folder, case)


def test_a_plain_part_of_the_heads_weight(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        assert_same(result["plain shard"]["got"], result["plain shard"]["want"], BOUND)


def test_collectives(of_two: list[dict[str, Any]]) -> None:
    """d hidden is DTensor's to add up; norms take one all-reduce, of all parameters together."""
    for result in of_two:
        assert result["counts"] == {"backward": [], "squared_norms": ["all_reduce"], "accumulate_": []}


def test_what_is_refused(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        said = result["refused"]
        assert (
            "the gradient of parameter 'norm.weight', which every rank has whole, is not the same"
            in said["norm over heads"]
        )
        assert said["split norm"].startswith(
            "TypeError: SequenceGradients: norm (LayerNorm) has a weight split in dimension 0"
        )
        assert "down is under transformers' tensor parallel style AllReduceParallel" in said["style"]
        assert "parameter 'up.weight' is a DTensor with placements (_StridedShard" in said["packed"]
        assert "head, which may have made them, has a plain weight" in said["plain logits"]
        for name in ("rowwise head", "whole head"):
            assert "wanted one split once, by its rows (ColwiseParallel)" in said[name]
        assert "nothing says that the other ranks have the same tokens" in said["undeclared head"]


# --- ranks without an entry -----------------------------------------------------------------------------------------------


class Few(nn.Module):
    """A vocabulary of 5: of four ranks the last has none of it. (torch's own embedding takes no empty part.)"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.table, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.head(self.table(ids)))


def few(head: str, mesh: Any) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    x = shared_models.batch()
    x |= {name: x[name] % 5 for name in ("ids", "labels")}
    plan = {"head": ColwiseParallel(use_local_output=False)}
    return Step(head).run(Few() if mesh is None else parallelize_module(Few(), mesh, plan), x)


# --- with FSDP2 -----------------------------------------------------------------------------------------------------------

TWO_DIMENSIONS = [(plan, units) for plan in ("vocabulary", "sequence parallel") for units in ("root", "each")]


def on_four(rank: int, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = on_ranks(rank, PLANS)
    every = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    found |= {f"few, {head}": few(head, every) for head in HEADS}
    mesh, x = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), shared_models.batch()
    rows = slice(mesh.get_local_rank("dp") * B // 2, (mesh.get_local_rank("dp") + 1) * B // 2)
    for plan, units in TWO_DIMENSIONS:
        for head in HEADS:
            model = parallel(plan, mesh["tp"])
            if units == "each":
                for module in [m for m in model.modules() if m._parameters]:
                    fully_shard(module, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
            mine = {name: values[rows] for name, values in x.items()}
            found[f"{plan}, {units}, {head}"] = Step(head, 2).run(model, mine, factor=2)
    return found | {"rows": rows, "transformers": of_distributed_config(folder)}


def of_distributed_config(folder: str) -> dict[str, Any]:
    """transformers' own FSDP2 around its tensor parallelism."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto", tp_size=2, fsdp_size=2)
    options = {"attn_implementation": "eager", "distributed_config": config}
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/qwen3", **options).train()
    x, first = token_batch(), dist.get_rank() // 2 * B // 2
    return Step("fast").run(model, {name: v[first : first + B // 2] for name, v in x.items()}, factor=2)


@pytest.fixture(scope="module")
def of_four(folder: str) -> list[dict[str, Any]]:
    return ranks.run(on_four, 4, folder)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("plan", PLANS)
def test_four_ranks(of_four: list[dict[str, Any]], plan: str, head: str) -> None:
    """Of 23 entries of the vocabulary and 12 tokens; the last rank's parts are smaller."""
    check_plan(of_four, plan, head)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_ranks_without_an_entry(of_four: list[dict[str, Any]], head: str) -> None:
    want = few(head, None)
    for result in of_four:
        assert_same(result[f"few, {head}"], want, BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("plan", "units"), TWO_DIMENSIONS)
def test_fsdp2_with_tensor_parallelism(of_four: list[dict[str, Any]], plan: str, units: str, head: str) -> None:
    want = Step(head).run(shared_models.made(), shared_models.batch())
    for result in of_four:
        assert_same(result[f"{plan}, {units}, {head}"], want, BOUND, result["rows"])


@pytest.mark.slow
def test_transformers_fsdp_with_its_plan(of_four: list[dict[str, Any]], folder: str) -> None:
    want = Step("fast").run(hugging_face("qwen3", folder, None), token_batch())
    for result in of_four:
        assert_same(result["transformers"], want, BOUND, result["rows"])
