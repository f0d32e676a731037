"""Exact per-sequence gradient norms: SequenceGradients against a plain step and against one trajectory at a time.

    python -m benchmarks.run_sequence_gradients [--shape 16,256,0]

Every way is verified against float64 per-sequence gradients first. Adds sequence_gradients.jsonl and .csv to --out.
Needs transformers for the model, a Llama of four layers.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import vcpo_kernels as vk
from benchmarks.run import device_slug
from benchmarks.run_linear import sizes, times
from benchmarks.timing import Stopwatch, peak_extra_mib
from vcpo_kernels import env

SHAPES = ("16,256,0", "16,256,128", "4,1024,0")
VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 32000, 512, 1376, 4, 8
ERROR_BOUND = 2e-5  # relative, of squared norms and of the gradient, in fp32

app = typer.Typer(add_completion=False)
console = Console(width=120)


@dataclass(frozen=True)
class Batch:
    """ids [B, T], the mask of what follows the prompt, and one coefficient per sequence as vcpo_loss gives them."""

    model: nn.Module
    ids: Tensor
    mask: Tensor
    coefficients: Tensor

    @property
    def segments(self) -> vk.Segments:
        return vk.Segments.padded(self.mask)


def make_batch(batch: int, length: int, prompt: int, device: torch.device) -> Batch:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=length,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    model = model.to(device)
    ids = torch.randint(0, VOCABULARY, (batch, length), device=device)
    mask = (torch.arange(length, device=device) >= prompt).expand(batch, length)
    return Batch(model, ids, mask, torch.randn(batch, device=device) / batch)


def plain(x: Batch) -> None:
    """Forward and backward of the loss with these coefficients: no norms."""
    stats = vk.token_stats(x.model(x.ids).logits, x.ids, x.mask, shift=True)
    (-(x.segments.sum(stats.logp) * x.coefficients).sum()).backward()


def plain_fused(x: Batch) -> None:
    with vk.patch_head(x.model):
        stats = x.model(x.ids).token_stats(x.ids, x.mask)
    (-(x.segments.sum(stats.logp) * x.coefficients).sum()).backward()


def ours(x: Batch) -> Tensor:
    with vk.SequenceGradients(x.model) as grads:
        stats = vk.token_stats(x.model(x.ids).logits, x.ids, x.mask, shift=True)
        return _norms_and_gradient(x, grads, stats)


def ours_fused(x: Batch) -> Tensor:
    with vk.SequenceGradients(x.model) as grads:
        with vk.patch_head(x.model):
            stats = x.model(x.ids).token_stats(x.ids, x.mask)
        return _norms_and_gradient(x, grads, stats)


def _norms_and_gradient(x: Batch, grads: vk.SequenceGradients, stats: vk.TokenStats) -> Tensor:
    grads.backward(x.segments.sum(stats.logp), x.segments)
    norms = grads.squared_norms()
    grads.accumulate_(x.coefficients)
    return norms


def one_by_one(x: Batch) -> Tensor:
    """The paper's procedure: a forward and a backward per trajectory, its gradient added to two buffers.

    With coefficients given, as the others have them: sum_i c_i grad_i, and the unweighted sum that the baseline needs.
    """
    parameters = [p for p in x.model.parameters() if p.requires_grad]
    unweighted = [torch.zeros_like(p) for p in parameters]
    norms = []
    for i, c in enumerate(x.coefficients.tolist()):
        ids, mask = x.ids[i : i + 1], x.mask[i : i + 1]
        stats = vk.token_stats(x.model(ids).logits, ids, mask, shift=True)
        gradients = torch.autograd.grad(vk.Segments.padded(mask).sum(stats.logp).sum(), parameters)
        norms.append(sum(g.square().sum() for g in gradients))
        for p, u, g in zip(parameters, unweighted, gradients, strict=True):
            u.add_(g)
            p.grad = g.mul_(-c) if p.grad is None else p.grad.add_(g, alpha=-c)
    return torch.stack([n for n in norms if isinstance(n, Tensor)])


CASES: dict[str, tuple[Callable[[Batch], Tensor | None], str]] = {
    "plain step": (plain, "plain step"),
    "plain step, fused head": (plain_fused, "plain step, fused head"),
    "SequenceGradients": (ours, "plain step"),
    "SequenceGradients, fused head": (ours_fused, "plain step, fused head"),
    "one trajectory at a time": (one_by_one, "plain step"),
}


def oracle(x: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared norms [B] and the weighted gradient, in float64, sequence by sequence."""
    exact = copy.deepcopy(x.model).double()
    total = {n: torch.zeros_like(p) for n, p in exact.named_parameters()}
    norms = []
    for i, c in enumerate(x.coefficients.tolist()):
        exact.zero_grad()
        logp = torch.log_softmax(exact(x.ids[i : i + 1]).logits[0, :-1], -1)
        picked = logp.gather(1, x.ids[i, 1:, None])[:, 0]
        picked[x.mask[i, 1:]].sum().backward()
        gradients = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
        norms.append(torch.stack([g.square().sum() for g in gradients.values()]).sum())
        for name, g in gradients.items():
            total[name].sub_(c * g)
    return torch.stack(norms), total


def verify(name: str, x: Batch, run: Callable[[Batch], Tensor | None], want: tuple[Tensor, dict[str, Tensor]]) -> float:
    """The larger relative error of norms and gradient; raises over the bound."""
    x.model.zero_grad()
    norms = run(x)
    off = {n: p.grad.double() - want[1][n] for n, p in x.model.named_parameters() if p.grad is not None}
    total = torch.stack([g.square().sum() for g in want[1].values()]).sum()
    error = float((torch.stack([d.square().sum() for d in off.values()]).sum() / total).sqrt())
    if norms is not None:
        error = max(error, float(((norms.double() - want[0]).abs() / want[0]).max()))
    if not error <= ERROR_BOUND:
        raise SystemExit(f"{name}: relative error {error:.2e} over the bound {ERROR_BOUND}")
    return error


def measure(x: Batch, watch: Stopwatch, progress: Progress) -> list[dict[str, Any]]:
    task = progress.add_task("float64 oracle", total=None)
    want = oracle(x)
    rows: list[dict[str, Any]] = []

    def step(run: Callable[[Batch], Tensor | None]) -> Callable[[], object]:
        def call() -> object:
            x.model.zero_grad()
            return run(x)

        return call

    for name, (run, against) in CASES.items():
        progress.update(task, description=f"verifying {name}")
        error = verify(name, x, run, want)
        # The gradients of the call before are there when it starts, and its own when it ends: they are not in the peak.
        peak = peak_extra_mib(watch.device, step(run))
        rows.append({"name": name, "against": against, "max_error": error, "peak_extra_mib": peak})
    progress.update(task, description="timing")
    timings = dict(zip(CASES, watch.measure_in_turn([step(run) for run, _ in CASES.values()]), strict=True))
    progress.remove_task(task)
    for row in rows:
        timing, base = timings[row["name"]], timings[row["against"]]
        row |= times(timing)
        row["of_plain"] = round(timing.median_ms / base.median_ms, 3)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    out = Table(title=title)
    for heading in ("", "ms", "of the plain step", "beyond gradients, MiB", "error"):
        out.add_column(heading, justify="right" if heading else "left")
    for r in rows:
        memory = "" if r["peak_extra_mib"] is None else f"{r['peak_extra_mib']:.0f}"
        out.add_row(r["name"], f"{r['median_ms']:.0f}", f"{r['of_plain']:.2f}", memory, f"{r['max_error']:.1e}")
    return out


@app.command()
def main(
    shape: Annotated[
        list[str] | None, typer.Option(help="B,T,prompt tokens among the T; may be given more than once")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path | None, typer.Option(help="folder; default benchmarks/results/<device>")] = None,
) -> None:
    """Verify, time and write the comparison."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    watch = Stopwatch(where, repeats)
    results: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        for text in shape or SHAPES:
            batch, length, prompt = sizes(text, "--shape", 3, least=0)
            rows = measure(make_batch(batch, length, prompt, where), watch, progress)
            title = f"B={batch} T={length}, {prompt} of them prompt, Llama {LAYERS} x {WIDTH}, V={VOCABULARY}, fp32, {where}"
            console.print(table(rows, title))
            common: dict[str, Any] = {
                "batch": batch,
                "length": length,
                "prompt": prompt,
                "threads": torch.get_num_threads(),
            }
            common["torch"] = torch.__version__
            results += [{**r, **common} for r in rows]
    target = out or Path("benchmarks/results") / device_slug(where)
    target.mkdir(parents=True, exist_ok=True)
    (target / "sequence_gradients.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    with open(target / "sequence_gradients.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)
    (target / "environment.txt").write_text("".join(f"{name}: {value}\n" for name, value in env.report()))
    console.print(f"written to {target}")


if __name__ == "__main__":
    app()
