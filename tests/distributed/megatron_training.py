"""docs/megatron.md's code as printed, in Megatron's own schedules, DistributedDataParallel and optimizers; and one process."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import vcpo_kernels as vk
from tests.distributed import megatron_on_cpu as megatron
from tests.distributed.megatron_on_cpu import VOCABULARY, B, H, T
from tests.docs.pages import snippets

SAMPLES, MICRO_BATCHES = 2, 2
RATES, EPSILON = (0.1, 0.075), 1e-2  # of two steps, as OptimizerParamScheduler has them below; of Adam


@dataclass(frozen=True)
class Case:
    """hidden: the page's code without logits. mixed: bf16, with fp32 main parameters. tensor, pipeline: ranks; others: data."""

    tensor: int = 2
    pipeline: int = 1
    hidden: bool = False
    sequence_parallel: bool = False
    tied: bool = False
    per_token: bool = False
    distributed: bool = False
    mixed: bool = False


CASES = {
    "logits": Case(),
    "logits, per token": Case(per_token=True, tied=True),
    "logits, distributed optimizer": Case(distributed=True, sequence_parallel=True),
    "hidden": Case(hidden=True, tied=True),
    "hidden, sequence parallel": Case(hidden=True, sequence_parallel=True),
    "hidden, sequence parallel, distributed optimizer": Case(
        hidden=True, sequence_parallel=True, tied=True, distributed=True
    ),
    "logits, two stages": Case(tensor=1, pipeline=2),
    "hidden, two stages": Case(pipeline=2, hidden=True, sequence_parallel=True),
}
MIXED = {"logits, bf16": Case(mixed=True), "hidden, bf16": Case(mixed=True, hidden=True, sequence_parallel=True)}


def alone(tied: bool) -> dict[str, Any]:
    """Two steps of one process at the rates that ESS makes: gradients of each, ESS / B of each, parameters after both."""
    x, found = megatron.batch(), {"gradients": [], "ratios": []}
    with megatron.parallel(1):
        gpt = megatron.gpt(tied=tied)
        found["start"] = {n: p.detach().clone() for n, p in gpt.named_parameters()}
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=0.0, eps=EPSILON, weight_decay=0.0, betas=(0.9, 0.999))
        for rate in RATES:
            optimizer.zero_grad()
            logits = gpt(x["ids"], x["positions"], megatron.causal())[..., :VOCABULARY]
            out = loss_of(vk.token_stats(logits, x["labels"], x["mask"]), x)
            out.loss.backward()
            optimizer.param_groups[0]["lr"] = rate * float(out.ess_ratio) ** 0.5
            found["gradients"].append({n: p.grad.clone() for n, p in gpt.named_parameters()})
            found["ratios"].append(out.ess_ratio)
            optimizer.step()
        found["parameters"] = {n: p.detach() for n, p in gpt.named_parameters()}
    return found


def loss_of(stats: vk.TokenStats, x: dict[str, Tensor]) -> vk.VCPOOutput:
    return vk.vcpo_loss(stats, x["mu"], x["rewards"], SAMPLES, vk.Segments.padded(x["mask"]))


class Training:
    """Megatron's model, optimizer and scheduler, and the page's names."""

    def __init__(self, case: Case, start: dict[str, Tensor]) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.transformer.module import Float16Module

        dtype = torch.bfloat16 if case.mixed else torch.float32
        options = {"calculate_per_token_loss": case.per_token, "bf16": case.mixed, "params_dtype": dtype}
        self.gpt = gpt = megatron.gpt(case.sequence_parallel, case.tied, **options)
        with torch.no_grad():
            for name, value in self.slices(start).items():
                gpt.get_parameter(name).copy_(value)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=case.distributed, grad_reduce_in_fp32=True)
        module = Float16Module(gpt.config, gpt) if case.mixed else gpt
        self.model = DistributedDataParallel(gpt.config, settings, module)
        adam = OptimizerConfig(
            optimizer="adam", lr=RATES[0], min_lr=0.0, weight_decay=0.0, adam_eps=EPSILON, clip_grad=0.0, bf16=case.mixed,
            params_dtype=dtype, use_distributed_optimizer=case.distributed,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(adam, [self.model], use_gloo_process_groups=False)
        gpt.config.finalize_model_grads_func = finalize_model_grads
        gpt.config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=RATES[0], min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=4 * B,
            lr_decay_style="linear", start_wd=0.0, end_wd=0.0, wd_incr_steps=1, wd_incr_style="constant",
        )  # fmt: skip
        self.names: dict[str, Any] = {
            "SEQUENCES": B, "SAMPLES": SAMPLES, "VOCABULARY": VOCABULARY, "SEQUENCE": T, "NUM_MICROBATCHES": MICRO_BATCHES,
            "MICRO_BATCH": self.sequences // MICRO_BATCHES, "optimizer": self.optimizer,
        }  # fmt: skip
        setup, of_logits, of_hidden, step = snippets("docs/megatron.md")
        for code in (setup, of_logits, *([of_hidden] if case.hidden else []), step):
            exec(code, self.names)

    @property
    def sequences(self) -> int:
        """Of this data rank."""
        from megatron.core import parallel_state

        return B // parallel_state.get_data_parallel_world_size()  # type: ignore[no-any-return]

    def batches(self) -> Any:
        from megatron.core import parallel_state

        x, size = megatron.batch(), self.sequences // MICRO_BATCHES
        start = parallel_state.get_data_parallel_rank() * self.sequences
        for at in range(start, start + self.sequences, size):
            part = {name: value[at : at + size] for name, value in x.items()}
            yield part | {"attention_mask": megatron.causal(), "behavior_logp": part["mu"]}

    def step(self) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        schedule = get_forward_backward_func()
        self.names["train_step"](schedule, self.batches(), self.model, self.optimizer, self.scheduler)

    def slices(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts, by the names that its stage has for them."""
        from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

        offset = get_transformer_layer_offset(self.gpt.config)

        def whole_name(name: str) -> str:
            return re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + offset}", name)

        return {n: megatron.slice_of(whole[whole_name(n)], p) for n, p in self.gpt.named_parameters()}

    def parameters(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.gpt.named_parameters()}


def trained(case: Case, want: dict[str, Any]) -> dict[str, Any]:
    """Two steps: (got, wanted) of the gradients of each, of the ratios, of the parameters' way, and the rates left behind."""
    training = Training(case, want["start"])
    start, step, gradients = training.parameters(), training.optimizer.step, []

    def recorded() -> Any:
        gradients.append({n: p.main_grad.clone() for n, p in training.gpt.named_parameters()})
        return step()

    training.optimizer.step = recorded
    (rate,) = training.names["ess_rates"]
    ratios, rates = [], []
    for _ in RATES:
        training.step()
        ratios.append(rate.ratio)
        rates.append([group["lr"] for group in training.optimizer.param_groups])
    end, wanted = training.parameters(), training.slices(want["parameters"])
    found: dict[str, Any] = {
        "ratios": (ratios, want["ratios"]), "rates": rates,
        "moved": ({n: end[n] - start[n] for n in end}, {n: wanted[n] - start[n] for n in end}),
    }  # fmt: skip
    if not case.distributed:  # else a rank has parts of the sums alone
        found["gradients"] = (gradients, [training.slices(g) for g in want["gradients"]])
    return found


def mixed(case: Case, want: dict[str, Any]) -> dict[str, Any]:
    """The first step: how far the main parameters went, by Adam's formula of their own gradients at the whole rate."""
    from vcpo_kernels.integrations.megatron import torch_optimizers

    training, found = Training(case, want["start"]), {}
    (inner,) = torch_optimizers(training.optimizer)
    main = [p for group in inner.param_groups for p in group["params"]]
    before, step = [p.detach().clone() for p in main], training.optimizer.step

    def recorded() -> Any:
        done = step()
        found["moved"] = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, main, strict=True)])
        found["whole"] = RATES[0] * torch.cat([(p.grad / (p.grad.abs() + EPSILON)).flatten() for p in main])
        return done

    training.optimizer.step = recorded
    training.step()
    (rate,) = training.names["ess_rates"]
    return found | {"ratio": rate.ratio, "wanted": want["ratios"][0], "dtypes": {p.dtype for p in main}}


def tokens_in_context(context: int, tensor: int) -> dict[str, Any]:
    """A model of tokens under Megatron's split of sequences, and of one process: gradients, statistics of the step."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    from vcpo_kernels.integrations import megatron as ours

    x = megatron.batch()
    with megatron.parallel(1):
        embedding, head = token_model()
        out = loss_of(vk.token_stats(logits_of(embedding, head, x["ids"])[..., :VOCABULARY], x["labels"], x["mask"]), x)
        out.loss.backward()
        want = [embedding.weight.grad, head.weight.grad]
    with megatron.parallel(tensor, context):
        ranks, (embedding, head) = ours.ranks(), token_model()
        share = B // parallel_state.get_data_parallel_world_size()
        rows = slice(
            parallel_state.get_data_parallel_rank() * share, (parallel_state.get_data_parallel_rank() + 1) * share
        )
        part = get_batch_on_this_cp_rank({name: x[name][rows] for name in ("ids", "labels", "mask", "mu")})
        logits = logits_of(embedding, head, part["ids"])
        shard = vk.VocabularyShard.even(ranks.vocabulary, logits.shape[-1], size=VOCABULARY)
        stats = vk.token_stats(logits, part["labels"], part["mask"], vocabulary=shard)
        segments = vk.Segments.padded(part["mask"], sequence_group=ranks.sequence)
        mine = vk.vcpo_loss(stats, part["mu"], x["rewards"][rows], SAMPLES, segments, ranks=ranks)
        mine.loss.backward()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        pairs = []
        for p, whole in zip((embedding.weight, head.weight), want, strict=True):
            dist.all_reduce(p.grad, group=group)
            pairs.append((p.grad / dist.get_world_size(group), megatron.slice_of(whole, p)))
        same = {name: (getattr(mine, name), getattr(out, name).detach()) for name in ("ess_ratio", "baselines")}
        return {"gradients": pairs, **same, "log_weights": (mine.log_weights, out.log_weights[rows])}


def token_model() -> tuple[Any, Any]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding

    settings = megatron.config()
    entries = megatron.padded(parallel_state.get_tensor_model_parallel_world_size())
    torch.manual_seed(2)
    options: dict[str, Any] = {"config": settings, "init_method": functools.partial(torch.nn.init.normal_, std=0.3)}
    embedding = VocabParallelEmbedding(entries, H, **options)
    return embedding, ColumnParallelLinear(H, entries, bias=False, gather_output=False, **options)


def logits_of(embedding: Any, head: Any, ids: Tensor) -> Tensor:
    return head(torch.tanh(embedding(ids)))[0]  # type: ignore[no-any-return]


@megatron.on_cpu
def on_four(rank: int) -> dict[str, Any]:
    want = {tied: alone(tied) for tied in (False, True)}
    found = {f"context {cp} x {tp}": tokens_in_context(cp, tp) for cp, tp in ((2, 2), (2, 1), (4, 1))}
    for name, case in (CASES | MIXED).items():
        with megatron.parallel(case.tensor, pipeline=case.pipeline):
            found[name] = (mixed if case.mixed else trained)(case, want[case.tied])
    return found
