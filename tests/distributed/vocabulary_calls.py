"""Ways to say what a rank's shard of a vocabulary is, calls inside compiled functions, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import vcpo_kernels as vk

V, H = 41, 6


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "logits": torch.randn(3, 4, V) * 3, "ids": torch.randint(0, V, (3, 4)), "g": torch.randn(3, 4),
        "hidden": torch.randn(3, 4, H), "weight": torch.randn(V, H), "bias": torch.randn(V),
    }  # fmt: skip


def loss_of(stats: vk.TokenStats, g: Tensor) -> Tensor:
    return (stats.logp * g + 0.3 * stats.entropy).sum()


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def on_rank(rank: int) -> dict[str, Any]:
    return {"dtensors": _dtensors(), "compiled": _compiled(rank), "refused": _refused(rank), "nothing": _nothing(rank)}


def _dtensors() -> dict[str, tuple[Any, ...]]:
    """Logits and gradients, and the collectives that torch saw."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    x, mesh = inputs(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    results: dict[str, tuple[Any, ...]] = {}
    logits = distribute_tensor(x["logits"], mesh, [Shard(2)]).requires_grad_()
    stats = vk.token_stats(logits, x["ids"])
    (grad,) = torch.autograd.grad(loss_of(stats, x["g"]), logits)
    results["logits"] = (stats.logp.detach(), grad.full_tensor())
    summed, _ = vk.weighted_logp(logits * 1, x["ids"], x["g"], inplace=True)
    (grad,) = torch.autograd.grad(summed, logits)
    results["known coefficients"] = (summed.detach(), grad.full_tensor())
    for name, placement in (("replicated", Replicate()), ("sharded by tokens", Shard(1))):
        hidden = distribute_tensor(x["hidden"], mesh, [placement]).requires_grad_()
        weight = distribute_tensor(x["weight"], mesh, [Shard(0)]).requires_grad_()
        bias = distribute_tensor(x["bias"], mesh, [Shard(0)]).requires_grad_()
        with CommDebugMode() as seen:
            stats = vk.linear_token_stats(hidden, weight, x["ids"], bias, shift=True)
            grads = torch.autograd.grad(loss_of(stats, x["g"]), (hidden, weight, bias))
        counts = {str(op).rpartition(".")[2]: n for op, n in seen.get_comm_counts().items()}
        results[f"hidden {name}"] = (
            stats.logp.detach(),
            *(d.full_tensor() for d in grads),
            counts,
            grads[0].placements,
        )
    plain = x["hidden"].clone().requires_grad_()
    stats = vk.linear_token_stats(
        plain, weight, x["ids"], bias, shift=True, vocabulary=vk.VocabularyShard.of_dtensor(weight, 0)
    )
    grads = torch.autograd.grad(loss_of(stats, x["g"]), (plain, weight, bias))
    results["hidden plain"] = (stats.logp.detach(), grads[0], *(d.full_tensor() for d in grads[1:]))
    results["refused"] = (
        message(lambda: vk.linear_token_stats(plain, weight, x["ids"])),
        message(lambda: vk.linear_weighted_logp(plain, weight, x["ids"], x["g"])),
        message(lambda: vk.token_stats(logits.redistribute(mesh, [Shard(0)]), x["ids"])),
        message(lambda: vk.token_stats(logits, x["ids"], inplace_backward=True)),
        message(lambda: vk.token_stats(logits, distribute_tensor(x["ids"], mesh, [Replicate()]))),
    )
    return results


def _local(rank: int) -> tuple[Tensor, vk.VocabularyShard]:
    padded = torch.nn.functional.pad(inputs()["logits"], (0, 1), value=1e4)
    return padded[..., rank * 21 : rank * 21 + 21].clone(), vk.VocabularyShard.even(dist.group.WORLD, 21, V)


def _compiled(rank: int) -> dict[str, Any]:
    """The collectives of the forward's graph, and what the compiled function differs by."""
    x, (logits, shard) = inputs(), _local(rank)

    def step(z: Tensor, temperature: float) -> Tensor:
        stats = vk.token_stats(z * 1.0, x["ids"], temperature=temperature, shift=True, vocabulary=shard)
        return loss_of(stats, x["g"])

    collectives: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        collectives.extend(n for n in names if "c10d_functional" in n and "wait" not in n)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    differences = []
    for temperature in (1.0, 0.7):
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        values = [f(z, temperature) for f, z in zip((step, compiled), leaves, strict=True)]
        grads = [torch.autograd.grad(value, z)[0] for value, z in zip(values, leaves, strict=True)]
        differences += [(values[0] - values[1]).abs().item(), (grads[0] - grads[1]).abs().max().item()]
    return {"collectives": collectives, "differences": differences}


def _refused(rank: int) -> dict[str, str]:
    """None of these gets as far as a collective on either rank."""
    x, (logits, shard) = inputs(), _local(rank)
    weight = torch.nn.Parameter(torch.randn(21, H))
    ids = x["ids"].clone()
    ids[1, 2] = V  # an entry that is padding

    return {
        "sum without a shard": message(
            lambda: vk.linear_token_stats(x["hidden"], x["weight"], x["ids"], sum_hidden=False)
        ),
        "sum of a number": message(
            lambda: vk.linear_weighted_logp(x["hidden"], weight, x["ids"], x["g"], vocabulary=shard, sum_hidden=1)  # type: ignore[arg-type]
        ),
        "id": message(lambda: vk.token_stats(logits, ids, vocabulary=shard)),
        "head id": message(lambda: vk.linear_token_stats(x["hidden"], weight, ids, vocabulary=shard)),
        "group": message(lambda: vk.token_stats(logits, x["ids"], vocabulary=dist.group.WORLD)),  # type: ignore[arg-type]
    }


def _nothing(rank: int) -> list[float]:
    """No token counts, or there is none."""
    x, (logits, shard) = inputs(), _local(rank)
    weight, none = torch.randn(21, H, requires_grad=True), torch.zeros(3, 4, dtype=torch.bool)
    sums = [
        vk.linear_token_stats(x["hidden"], weight, x["ids"], mask=none, vocabulary=shard).logp.sum(),
        vk.linear_token_stats(x["hidden"][:0], weight, x["ids"][:0], vocabulary=shard).logp.sum(),
        vk.token_stats(logits.requires_grad_(), x["ids"], none, vocabulary=shard).logp.sum(),
        vk.token_stats(logits[:0], x["ids"][:0], vocabulary=shard).logp.sum(),
    ]
    torch.stack(sums).sum().backward()
    assert weight.grad is not None
    assert logits.grad is not None
    return [*(s.item() for s in sums), weight.grad.abs().sum().item(), logits.grad.abs().sum().item()]
