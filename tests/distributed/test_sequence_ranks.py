"""SequenceGradients where ranks have other tokens of the same sequences: norms and gradients are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import vcpo_kernels as vk
from tests import ranks
from tests.distributed import sharded_models as models
from tests.distributed import shared_models
from tests.distributed.counting import collectives
from tests.distributed.shared_models import B, Step, T, assert_same
from tests.distributed.test_tensor_parallel import FIRST, parallel
from tests.distributed.vocabulary_calls import message
from tests.sequence_gradients.models import VOCABULARY, token_model

BOUND = 1e-6
LEAN = {"chunk_bytes": 64 * 8}  # blocks of a few entries
STEPS = {"logits": Step(), "fast": Step("fast", 2), "lean": Step("lean", 1, LEAN)}
CASES = [(tied, head) for tied in (False, True) for head in STEPS]
LAYOUTS = ("padded", "packed", "indexed")


def part(x: dict[str, Tensor], at: Tensor) -> dict[str, Tensor]:
    return {name: values[:, at].contiguous() if values.dim() == 2 else values for name, values in x.items()}


def summed(found: dict[str, Any]) -> dict[str, Any]:
    for gradient in found["gradients"].values():
        dist.all_reduce(gradient)
    return found


def of_attention(tied: bool, head: str, rank: int | None) -> dict[str, Any]:
    """Of tokens in pieces, every rank's as long; in the micro-batched case dealt out in turn. rank None: of one process."""
    x, step, at = shared_models.batch(), STEPS[head], torch.arange(T)
    if rank is None:
        return step.run(shared_models.made(tied, True), x, None, at)
    world, group = dist.get_world_size(), dist.group.WORLD
    mine = at[rank::world] if step.micro_batches > 1 else at.tensor_split(world)[rank]
    return summed(step.run(shared_models.made(tied, True, group), part(x, mine), group, mine))


def segments_of(layout: str, owners: Tensor, mask: Tensor, group: Any) -> vk.Segments:
    if layout == "padded":
        return vk.Segments.padded(mask, sequence_group=group)
    if layout == "packed":
        bounds = torch.searchsorted(owners, torch.arange(B + 1))
        return vk.Segments.packed(bounds, mask, sequence_group=group)
    return vk.Segments.indexed(owners[None], B, mask, sequence_group=group)


def uneven(layout: str, length: int, rank: int | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A model token by token, ranks with other numbers of tokens, and with none of a sequence, or of all."""
    torch.manual_seed(length)
    x = {name: torch.randint(3, VOCABULARY, (B, length)) for name in ("ids", "labels")}
    mask, c, owners = torch.rand(B, length) < 0.8, torch.randn(B), torch.arange(B).repeat_interleave(length)
    mask[1] = False
    x["mask"] = mask
    if layout != "padded":
        x = {name: values.reshape(1, -1) for name, values in x.items()}
    group = None
    if rank is not None:
        world, group = dist.get_world_size(), dist.group.WORLD
        if layout == "padded":
            mine = torch.arange(length).tensor_split(world)[rank]
        else:
            index = torch.arange(B * length)
            mine = index[(index * 7 + index // 3) % world == rank]
            mine = mine[torch.randperm(len(mine))] if layout == "indexed" else mine
            owners = owners[mine]
        x = part(x, mine)
    segments = segments_of(layout, owners, x["mask"], group)
    model = token_model().to(dtype)
    with vk.SequenceGradients(model) as grads:
        stats = vk.token_stats(model(x["ids"]), x["labels"], x["mask"])
        grads.backward(segments.sum(stats.logp), segments)
        norms = grads.squared_norms_by_parameter()
        grads.accumulate_(c)
    found = {"norms": norms, "gradients": models.gradients_of(model)}
    return found if rank is None else summed(found)


def counts(rank: int) -> dict[str, list[str]]:
    """The collectives of each method; check="never": without the probe's."""
    group, at = dist.group.WORLD, torch.arange(T).tensor_split(dist.get_world_size())[rank]
    x, model, found = part(shared_models.batch(), at), token_model(), {}
    segments = vk.Segments.padded(x["mask"], sequence_group=group)
    with vk.SequenceGradients(model, check="never") as grads:
        stats = vk.token_stats(model(x["ids"]), x["labels"], x["mask"])
        per_sequence = segments.sum(stats.logp)
        for name, call in (
            ("backward", lambda: grads.backward(per_sequence, segments)),
            ("squared_norms", grads.squared_norms),
            ("accumulate_", lambda: grads.accumulate_(x["c"])),
        ):
            with collectives() as called:
                call()
            found[name] = sorted(called)
    return found


def mixed(rank: int) -> str:
    """Rows that carry another sequence's gradient on the first rank alone."""
    x, model = part(shared_models.batch(), torch.arange(T).tensor_split(dist.get_world_size())[rank]), token_model()
    segments = vk.Segments.padded(x["mask"], sequence_group=dist.group.WORLD)

    def call() -> None:
        with vk.SequenceGradients(model) as grads:
            logp = vk.token_stats(model(x["ids"]), x["labels"]).logp
            if rank == 0:
                logp = logp + logp.mean(0)
            grads.backward(segments.sum(logp), segments)

    return message(call)


def accumulated(rank: int) -> str:
    """OPOBAccumulator takes the norm of what this rank's tokens leave."""
    x, model = part(shared_models.batch(), torch.arange(T).tensor_split(dist.get_world_size())[rank]), token_model()
    opob = vk.OPOBAccumulator(model.parameters(), vk.VCPOConfig(num_sequences=2))
    opob.start_group(torch.tensor([1.0, 0.0]))
    stats = vk.token_stats(model(x["ids"][:1]), x["labels"][:1], x["mask"][:1])
    segments = vk.Segments.padded(x["mask"][:1], sequence_group=dist.group.WORLD)
    return message(lambda: opob.backward(stats, stats.logp.detach(), segments))


def on_ranks(rank: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {f"{case}": of_attention(*case, rank) for case in CASES}
    found |= {f"{layout}, {n}": uneven(layout, n, rank) for layout in LAYOUTS for n in lengths}
    found |= {"counts": counts(rank), "mixed": mixed(rank), "accumulated": accumulated(rank)}
    return found | {"bf16": uneven("padded", 8, rank, torch.bfloat16)}


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(on_ranks, 2, (5, 1))


def check(of_ranks: list[dict[str, Any]], name: str, want: dict[str, Any], bound: float = BOUND) -> None:
    for result in of_ranks:
        assert_same(result[name], want, bound)
        for parameter, norms in of_ranks[0][name]["norms"].items():
            assert torch.equal(result[name]["norms"][parameter], norms), parameter


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(of_two: list[dict[str, Any]], case: tuple[bool, str]) -> None:
    """The ranks' parts of a gradient have cross terms, 6 to 7% of a norm; in a lean head they are had block by block."""
    check(of_two, f"{case}", of_attention(*case, None))


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_uneven_parts(of_two: list[dict[str, Any]], layout: str, length: int) -> None:
    """Length 1: a rank has no token at all."""
    check(of_two, f"{layout}, {length}", uneven(layout, length, None))


def test_bfloat16(of_two: list[dict[str, Any]]) -> None:
    """Factors travel as they are; gradients are each rank's share, rounded before they are summed."""
    want = uneven("padded", 8, None, torch.bfloat16)
    for result in of_two:
        assert_same({"norms": result["bf16"]["norms"], "gradients": want["gradients"]}, want, BOUND)
        shared_models.assert_gradients(result["bf16"]["gradients"], want["gradients"], 2.0**-7)


def test_collectives(of_two: list[dict[str, Any]]) -> None:
    """What is known of all (one gather), the gradients kept whole (one sum), the left factors (of three Linears an
    all-to-all each) and the right ones (a gather each; of the table's ids too), the norms (one sum).
    """
    for result in of_two:
        called = result["counts"]
        assert called["backward"] == called["accumulate_"] == []
        assert called["squared_norms"] == ["all_gather"] * (1 + 3 + 2) + ["all_reduce"] * 2 + ["all_to_all"] * 3


def test_mixed_rows_are_an_error_on_every_rank(of_two: list[dict[str, Any]]) -> None:
    first, second = (result["mixed"] for result in of_two)
    assert "do not carry the gradient of per_sequence" in first
    assert "another rank that works on these sequences has found rows" in second


def test_the_accumulator_refuses_parts(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        assert result["accumulated"].startswith("ValueError: OPOBAccumulator.backward: segments have a sequence_group")


def with_data_ranks(tied: bool, head: str, mesh: Any) -> dict[str, Any]:
    """FSDP2 over both dimensions; rows of this data rank, tokens of this sequence rank."""
    from torch.distributed.fsdp import fully_shard

    group, flat = mesh["cp"].get_group(), mesh["dp", "cp"]._flatten()
    model = shared_models.made(tied, True, group)
    for module in (model.attention, model.norm, model.last):
        fully_shard(module, mesh=flat)
    fully_shard(model, mesh=flat)
    first = mesh.get_local_rank("dp") * B // 2
    rows = slice(first, first + B // 2)
    mine = {name: values[rows] for name, values in shared_models.batch().items()}
    at = torch.arange(T).tensor_split(2)[mesh.get_local_rank("cp")]
    return STEPS[head].run(model, part(mine, at), group, at, factor=4) | {"rows": rows}


def with_tensor_parallelism(plan: str, head: str, mesh: Any) -> dict[str, Any]:
    group, at = mesh["cp"].get_group(), torch.arange(T).tensor_split(2)[mesh.get_local_rank("cp")]
    found = STEPS[head].run(parallel(plan, mesh["tp"]), part(shared_models.batch(), at), group)
    for gradient in found["gradients"].values():
        dist.all_reduce(gradient, group=group)
    return found


def on_four(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    data = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    parts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    found = on_ranks(rank, (5,)) | {f"dp, {case}": with_data_ranks(*case, data) for case in CASES}
    return found | {f"{plan}, {head}": with_tensor_parallelism(plan, head, parts) for plan in FIRST for head in STEPS}


@pytest.fixture(scope="module")
def of_four() -> list[dict[str, Any]]:
    return ranks.run(on_four, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_with_fsdp2_over_data_and_sequence_ranks(of_four: list[dict[str, Any]], case: tuple[bool, str]) -> None:
    want = of_attention(*case, None)
    for result in of_four:
        assert_same(result[f"dp, {case}"], want, BOUND, result[f"dp, {case}"]["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("head", STEPS)
@pytest.mark.parametrize("plan", FIRST)
def test_with_tensor_parallelism(of_four: list[dict[str, Any]], plan: str, head: str) -> None:
    """Exchanged are the factors of a parameter's part; its norms add over both dimensions."""
    want = STEPS[head].run(shared_models.made(), shared_models.batch())
    for result in of_four:
        assert_same(result[f"{plan}, {head}"], want, BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_ranks(of_four: list[dict[str, Any]], case: tuple[bool, str]) -> None:
    check(of_four, f"{case}", of_attention(*case, None))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_uneven_parts_on_four(of_four: list[dict[str, Any]], layout: str) -> None:
    check(of_four, f"{layout}, 5", uneven(layout, 5, None))
