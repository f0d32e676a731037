"""VCPOAsyncTrainer: TRL's AsyncGRPOTrainer with VCPO's correction of staleness and its step.

That trainer packs samples into prefix trees: a token that samples share is forwarded once, and the loss is taken over flat
terms, each with the position that predicts it, its log mu, its advantage and its sample. `Segments.indexed` reads exactly
that. Weights need a sample's own terms only, so there is one pass. Advantages come ready from the rollout worker, which
normalises rewards by group; raw rewards and whole groups do not reach the trainer, and with them no off-policy baseline.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.trainer.base_config import _BaseConfig

import vcpo_kernels as vk
from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations.trl.config import check_ess
from vcpo_kernels.integrations.trl.options import ASYNC_GRPO, refuse_options
from vcpo_kernels.integrations.trl.step import EssStep
from vcpo_kernels.integrations.trl.support import check_whole
from vcpo_kernels.integrations.trl.window import behavior_logp
from vcpo_kernels.sequences.log_weights import usable_below


@dataclass
class VCPOAsyncTrainingConfig(AsyncGRPOConfig):
    """Arguments of `VCPOAsyncTrainer`: all of AsyncGRPOConfig's, and VCPO's own as in `VCPOTrainingConfig`.

    Raises TypeError or ValueError naming the field, and ValueError for options that are not honoured, by name.
    """

    max_weight: float | None = field(
        default=8.0, metadata={"help": "Truncation of sequence importance weights in the loss. None: untruncated."}
    )
    ess_rule: str = field(
        default="sqrt", metadata={"help": "Step scaling by the effective sample size: 'sqrt', 'linear' or 'none'."}
    )
    ess_reference: float = field(default=1.0, metadata={"help": "ESS ratio from which on steps are full."})

    def __post_init__(self) -> None:
        check = Check("VCPOAsyncTrainingConfig")
        refuse_options(check.where, self, AsyncGRPOConfig, _BaseConfig, ASYNC_GRPO)
        super().__post_init__()
        check_ess(check, self)


@dataclass(frozen=True)
class FlatLoss:
    """Of M terms and B samples. total: -sum_t w^_i A_t logp_t, 0-d, differentiable in logp, reported with logp's factor at 1.

    log_weights: L_i [B]. lengths: |T_i| [B]. weights: w^_i [B], 0 for a sample that is dropped.
    """

    total: Tensor
    log_weights: Tensor
    lengths: Tensor
    weights: Tensor


def flat_loss(
    logp: Tensor, behavior: Tensor, advantages: Tensor, segment_id: Tensor, num_sequences: int, max_weight: float | None
) -> FlatLoss:
    """-sum_t w^_i A_t grad logp_t over flat terms, w^_i = exp(min(L_i, log max_weight)), L_i = sum_t (logp_t - log mu_t).

    A sample whose L_i is NaN or +inf is dropped; a NaN of log mu (a token that the sampler could not score) counts as
    log mu = logp.

    Args:
        logp: [M] log pi of each term's target under the current policy.
        behavior: [M] log mu. advantages: [M]. segment_id: [M] integers, which of the num_sequences samples.
        max_weight: truncation, or None.

    >>> import torch
    >>> from vcpo_kernels.integrations.trl.async_trainer import flat_loss
    >>> logp = torch.tensor([-1.0, -2.0, -1.0], requires_grad=True)
    >>> loss = flat_loss(logp, torch.tensor([-1.0, -2.0, -9.0]), torch.ones(3), torch.tensor([0, 0, 1]), 2, 8.0)
    >>> loss.total.backward(); logp.grad, loss.log_weights
    (tensor([-1., -1., -8.]), tensor([0., 8.]))
    """
    segments = vk.Segments.indexed(segment_id, num_sequences)
    mu = behavior_logp(logp, behavior, None)
    log_weights = vk.sequence_log_weights(logp.detach(), mu, segments)
    limit = math.inf if max_weight is None else math.log(max_weight)
    ok = log_weights < usable_below(max_weight)
    weights = torch.where(ok, log_weights.clamp(max=limit), -math.inf).exp()
    c = segments.spread(weights) * advantages
    surrogate = torch.where(c != 0, c * logp, 0.0).sum()
    total = -(surrogate - surrogate.detach() + c.sum())
    return FlatLoss(total, log_weights, segments.lengths, weights)


class VCPOAsyncTrainer(AsyncGRPOTrainer):
    """AsyncGRPOTrainer, corrected by truncated sequence weights, with steps scaled by sqrt(ESS / B) (arXiv 2602.17616).

    Same arguments, `args` a VCPOAsyncTrainingConfig. Tokens are averaged as TRL does, over each micro-batch of all ranks.
    ESS is of all samples of the optimizer step, over all ranks.

    Raises TypeError where args is no VCPOAsyncTrainingConfig.
    """

    args: Any
    _tag_names = ["trl", "vcpo", "async-grpo"]  # noqa: RUF012 (TRL's attribute)
    _name = "AsyncVCPO"

    def __init__(
        self,
        model: str,
        reward_funcs: Any = None,
        args: VCPOAsyncTrainingConfig | None = None,
        *rest: Any,
        **options: Any,
    ) -> None:
        if args is None:
            args = VCPOAsyncTrainingConfig(f"{model.split('/')[-1]}-AsyncVCPO")
        if not isinstance(args, VCPOAsyncTrainingConfig):
            raise TypeError(
                f"VCPOAsyncTrainer: args must be a VCPOAsyncTrainingConfig, got {checks.describe(type(args).__name__)}. It "
                "takes all arguments of AsyncGRPOConfig: change the name."
            )
        super().__init__(model, reward_funcs, args, *rest, **options)
        check_whole(type(self).__name__, self.model)
        self._ess_step = EssStep(self, args.ess_rule, args.ess_reference, across_ranks=True)
        self.add_callback(self._ess_step)

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The Trainer fetches an optimizer step's batches here."""
        self._ess_step.reset()  # a step that was skipped left its observations
        batches: tuple[list[Any], Any] = super().get_batch_samples(*arguments)
        return batches

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if return_outputs:
            raise ValueError("VCPOAsyncTrainer.compute_loss returns no outputs. Leave return_outputs=False.")
        started = time.time()
        out = model(**_forward_arguments(inputs), **({"output_router_logits": True} if self.aux_loss_enabled else {}))
        self._step_forward_s += time.time() - started
        terms = inputs["token_index"] >= 0
        behavior, advantages, sample = (inputs[k][terms] for k in ("old_log_probs", "advantages", "segment_id"))
        at = inputs["token_index"][terms]
        part = flat_loss(
            out.log_probs.flatten()[at], behavior, advantages, sample, int(sample.max()) + 1, self.args.max_weight
        )
        self._ess_step.observe(vk.effective_sample_size(part.log_weights, part.lengths > 0))
        # Gradients are averaged over ranks, and micro-batches added up.
        tokens_per_rank = (inputs["global_n_tokens"][0] / self.accelerator.num_processes).clamp(min=1.0)
        accumulated = self.current_gradient_accumulation_steps
        loss = part.total / tokens_per_rank.to(part.total.dtype) / accumulated
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * out.aux_loss / accumulated
            mean = self.accelerator.reduce(out.aux_loss.detach().float(), reduction="mean")
            self._metrics["train"]["aux_loss"].append(float(mean))
        self._log_part(part, out.entropy.flatten()[at].detach())
        self._count_tokens(inputs)
        return loss

    @torch.no_grad()
    def _log_part(self, part: FlatLoss, entropy: Tensor) -> None:
        """Sums over ranks, logged as (numerator, denominator) so that a logging window averages them by what they count."""
        ok = (part.lengths > 0) & (part.log_weights < usable_below(self.args.max_weight))
        limit = math.inf if self.args.max_weight is None else math.log(self.args.max_weight)
        log_weights = torch.where(ok, part.log_weights, 0.0)
        sums = torch.stack([
            ok.double().sum(), (part.lengths > 0).double().sum() - ok.double().sum(),
            (log_weights > limit).double().sum(), log_weights.double().sum(),
            entropy.double().sum(), torch.full((), entropy.numel(), dtype=torch.float64, device=entropy.device),
        ])  # fmt: skip
        taking_part, dropped, truncated, log_weight, entropies, tokens = self.accelerator.reduce(sums, "sum").tolist()
        highest = torch.where(ok, part.log_weights, -math.inf).max()
        metrics = self._metrics["train"]
        metrics["vcpo/truncated_fraction"].append((truncated, taking_part))
        metrics["vcpo/log_weight_mean"].append((log_weight, taking_part))
        metrics["vcpo/log_weight_max"].append(float(self.accelerator.gather(highest).max()))
        metrics["vcpo/nonfinite_sequences_total"].append(dropped)
        metrics["entropy"].append((entropies, tokens))

    def _count_tokens(self, inputs: dict[str, Tensor]) -> None:
        """What TRL's throughput metrics are made of, of all ranks."""
        forwarded, mean_length = float(inputs["global_n_forward_tokens"][0]), float(inputs["mean_seq_len"][0])
        self._step_forward_tokens += forwarded
        self._step_trained_tokens += float(inputs["global_n_tokens"][0])
        self._step_seq_len_weighted += mean_length * forwarded
        self._step_samples += forwarded / mean_length

    def _get_learning_rate(self) -> float:
        """The rate as the last step used it; the scheduler keeps its own."""
        return float(super()._get_learning_rate()) * self._ess_step.scale


def _forward_arguments(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The row without the padding that makes ranks' rows equally long, as the tree attention takes it."""
    real = inputs["attention_mask"].bool()
    arguments: dict[str, Any] = {k: inputs[k][real][None] for k in ("input_ids", "position_ids", "shift_labels")}
    for key in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k"):
        arguments[key] = inputs[key][inputs[key] >= 0]
    longest_q, longest_k = inputs["tree_max_seqlens"][0].tolist()
    return arguments | {"tree_max_seqlen_q": longest_q, "tree_max_seqlen_k": longest_k, "fused_lm_head": True}
