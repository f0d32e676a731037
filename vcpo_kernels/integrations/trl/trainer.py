"""VCPOTrainer: TRL's GRPOTrainer with VCPO's weights, baselines and step.

What is TRL's stays TRL's: generation, rewards, reference model, logging, checkpoints. What differs is an optimizer step's
window, all its micro-batches: the parameters do not change within it. Where micro-batches hold whole groups (`way.py`), each is
read once: its forward takes the statistics, from which its coefficients come (`window.py`), and is the one that is
differentiated. Where they do not, a pass without gradients takes the statistics of the whole window, before its first
backward; what then remains for each micro-batch is one known coefficient per token, and the head takes its gradient in the
same pass (`head.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

import vcpo_kernels as vk
from vcpo_kernels.core import checks
from vcpo_kernels.integrations.trl.config import VCPOTrainingConfig
from vcpo_kernels.integrations.trl.head import attach_head, weighted
from vcpo_kernels.integrations.trl.step import EssStep
from vcpo_kernels.integrations.trl.support import (
    adapted_heads_allowed,
    check_adapted_head,
    check_head,
    check_support,
    check_whole,
    idle_watch,
    warn_of_dropout,
    watch_idleness,
)
from vcpo_kernels.integrations.trl.way import OpenWindow, say, way_of
from vcpo_kernels.integrations.trl.window import (
    Counts,
    MicroBatchLoss,
    TokenStatistics,
    Window,
    WindowConfig,
    behavior_logp,
    micro_batch_loss,
    sequence_columns,
    split_rows,
    window_of,
)
from vcpo_kernels.parallel.collectives import gathered_rows
from vcpo_kernels.parallel.ranks import world
from vcpo_kernels.sequences.behavior import warn_of_means

PAPER = {
    "title": "Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs",
    "id": "2602.17616",
}


class VCPOTrainer(GRPOTrainer):
    """GRPOTrainer, trained by VCPO (arXiv 2602.17616): same arguments, `args` a VCPOTrainingConfig.

    gradient = -sum_i k_i w^_i A_i sum_t grad log pi(y_it) over the sequences of the accumulation window on all processes,
    with w^_i = min(exp(L_i), max_weight), L_i = sum_t (log pi - log mu), A_i = (R_i - b_g) / std_g and b_g the off-policy
    optimal baseline; the step is scaled by sqrt(ESS / B) of the same window. log mu is the sampler's own record
    (`sampling_per_token_logps`), else what the trainer computed on sampling (`old_per_token_logps`), else log pi (w = 1).

    Everything is logged under `vcpo/`; `learning_rate` is logged as it was used.

    Raises:
        TypeError: args is no VCPOTrainingConfig. ValueError: a set-up that is not supported, by name (docs/trl.md).

    Example:
        trainer = VCPOTrainer(
            model="Qwen/Qwen2.5-0.5B-Instruct",
            reward_funcs=accuracy_reward,
            args=VCPOTrainingConfig(output_dir="out", num_iterations=2),
            train_dataset=dataset,
        )
        trainer.train()
    """

    args: Any  # a VCPOTrainingConfig
    model: Any
    max_completion_length: Any
    num_generations: Any
    num_generations_eval: Any
    _buffered_inputs: Any
    _logs: Any
    _tag_names = ["trl", "vcpo"]  # noqa: RUF012 (TRL's attributes)
    _name = "VCPO"
    _paper = PAPER

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: VCPOTrainingConfig | None = None, *rest: Any, **options: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = VCPOTrainingConfig(f"{name.split('/')[-1] or 'model'}-VCPO")
        if not isinstance(args, VCPOTrainingConfig):
            raise TypeError(
                f"VCPOTrainer: args must be a VCPOTrainingConfig, got {checks.describe(type(args).__name__)}. It takes all "
                "arguments of GRPOConfig: change the name."
            )
        check_whole(type(self).__name__, model)  # before transformers' Trainer changes what it was told of the ranks
        with adapted_heads_allowed():
            super().__init__(model, reward_funcs, args, *rest, **options)
        self._window_config = WindowConfig(
            max_weight=args.max_weight,
            baseline_weighting=args.baseline_weighting,
            aggregation=args.token_aggregation,
            normalize_std=args.scale_rewards == "group",
            ess_max_weight=args.ess_max_weight,
            max_tokens=float(self.max_completion_length),
            beta=self.beta,
            kl_correction=args.use_bias_correction_kl,
        )
        check_support(self)
        check_adapted_head(self)
        for policy in (self.model, self.ref_model):
            if policy is not None:
                bare = self.accelerator.unwrap_model(policy)
                base = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
                check_head(type(self).__name__, base)
                attach_head(base, self.temperature, args.cast_lm_head_to_fp32)
        self._ess_step = EssStep(self, args.ess_rule, args.ess_reference)
        self._idle = idle_watch(self)
        self.add_callback(self._ess_step)
        self._way = way_of(self)
        say(self._way, self.accelerator.is_main_process)
        if not self._way.one_pass:
            warn_of_dropout(self.model, args.disable_dropout)
        self._raw_window: list[Any] = []
        self._open: OpenWindow | None = None
        self._ready: deque[dict[str, Any]] = deque()
        self._rows_seen = 0  # sequences generated so far, all processes: rows and groups are numbered by it
        self._groups_seen = 0
        self._gathered_rewards: Tensor | None = None

    # --- generation and rewards: TRL's, with R_i and the group beside each sequence ------------------------------------

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*arguments)
        self._gathered_rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        per_function = self._gathered_rewards
        assert per_function is not None
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        unscorable = per_function.isnan().all(dim=1)  # by every function: takes no part, as with TRL
        total, size = len(rewards), len(inputs)
        here = slice(self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size)
        row = torch.arange(total, device=rewards.device)
        generations = self.num_generations if self.model.training else self.num_generations_eval
        output["vcpo_rewards"] = rewards[here]
        output["vcpo_scorable"] = ~unscorable[here]
        output["vcpo_groups"] = (self._groups_seen + row // generations)[here]
        output["vcpo_rows"] = (self._rows_seen + row)[here]
        self._rows_seen += total
        self._groups_seen += -(-total // generations)
        return output

    def get_train_dataloader(self) -> Any:
        """TRL's, but for a dataset too small to fill one generation, which it would train for no step at all."""
        wanted = self.args.generation_batch_size // self.num_generations
        found = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else wanted
        if found < wanted:
            raise ValueError(
                f"VCPOTrainer: train_dataset has {found} prompts, and one generation takes {wanted} (generation_batch_size="
                f"{self.args.generation_batch_size} / num_generations={self.num_generations}): no step would be trained. "
                "Add prompts, or lower per_device_train_batch_size or gradient_accumulation_steps."
            )
        return super().get_train_dataloader()

    # --- the window ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The Trainer fetches an optimizer step's batches here: they are the window."""
        batches, num_items = super().get_batch_samples(*arguments)
        self._raw_window = batches
        self._ready.clear()
        return batches, num_items

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training:
            batch = super()._prepare_inputs(generation_batch)
            return self._with_coefficients([batch], "eval")[0]
        if not self._ready:
            self._ess_step.reset()  # a step that a GradScaler skipped left its observation
            batches = [self._micro_batch(self._step + i, raw) for i, raw in enumerate(self._raw_window)]
            if self._way.one_pass:
                self._open = OpenWindow(batches, Counts.of([_trained_mask(b) for b in batches], world()))
                self._ready.extend(batches)
            else:
                self._ready.extend(self._with_coefficients(batches, "train"))
        return self._ready.popleft()

    def _micro_batch(self, step: int, generation_batch: Any) -> dict[str, Any]:
        """The micro-batch of one forward and backward, generated every steps_per_generation * num_iterations of them."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        if step % generate_every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_rows(batch, self.args.steps_per_generation)
        micro_batch: dict[str, Any] = self._buffered_inputs[step % self.args.steps_per_generation]
        return micro_batch

    # --- two passes ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _with_coefficients(self, batches: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
        """The micro-batches of a window, each with the coefficients of its tokens; metrics logged, ESS observed."""
        config = self._window_config
        passes = [self._statistics(batch) for batch in batches]
        columns = torch.cat([
            sequence_columns(stats, norms, batch["vcpo_rewards"], batch["vcpo_groups"], config)
            for (stats, norms), batch in zip(passes, batches, strict=True)
        ])  # fmt: skip
        every = gathered_rows(columns, world())
        window = window_of(every.rows, config)
        processes = self.accelerator.num_processes
        ready, start = [], every.mine.start
        for (stats, _), batch in zip(passes, batches, strict=True):
            rows = slice(start, start + len(stats.mask))
            start = rows.stop
            share = micro_batch_loss(stats, window, rows, config, self.entropy_coef)
            # Gradients, and the logged loss, are averaged over processes; the window's are sums.
            batch = {**batch, "vcpo_c": share.coefficients * processes, "vcpo_value": share.value * processes}
            if share.entropy_coefficients is not None:
                batch["vcpo_h"] = share.entropy_coefficients * processes
            ready.append(batch)
        self._close(window, batches, mode)
        return ready

    def _statistics(self, batch: dict[str, Any]) -> tuple[TokenStatistics, Tensor]:
        """Token statistics of a micro-batch under the current parameters, and its squared score norms [B]."""
        # Not the wrapped model: DistributedDataParallel has nothing to do in a pass that leaves no gradient.
        model = self.accelerator.unwrap_model(self.model)
        mask = _trained_mask(batch)
        if self.args.score_norm == "exact":
            with vk.SequenceGradients(model) as gradients:
                out, norms = self._exact_norms(gradients, model, batch, mask)
        else:
            checkpointing = self.args.gradient_checkpointing_kwargs  # without a gradient there is nothing to recompute
            with self.compute_loss_context_manager(), disable_gradient_checkpointing(self.model, checkpointing):
                out = model(**self._model_inputs(batch))
            norms = self._logit_norms(out, mask)
        return self._token_statistics(out, batch, mask), norms

    def _token_statistics(self, out: Any, batch: dict[str, Any], mask: Tensor) -> TokenStatistics:
        tokens = mask.shape[1]
        logp, entropy = out.log_probs[:, -tokens:].detach(), out.entropy[:, -tokens:].detach()
        correct_sampler = not self.use_vllm or self.vllm_importance_sampling_correction
        mu = behavior_logp(
            logp, batch.get("sampling_per_token_logps"), batch.get("old_per_token_logps"), correct_sampler
        )
        return TokenStatistics(mask, logp, entropy, mu, batch.get("ref_per_token_logps"))

    def _logit_norms(self, out: Any, mask: Tensor) -> Tensor:
        return vk.Segments.padded(mask).sum(out.score_sqnorm[:, -mask.shape[1] :])

    @torch.enable_grad()
    def _exact_norms(
        self, gradients: vk.SequenceGradients, model: nn.Module, batch: dict[str, Any], mask: Tensor
    ) -> tuple[Any, Tensor]:
        with self.compute_loss_context_manager():
            out = model(**self._model_inputs(batch))
        segments = vk.Segments.padded(_over_prompt(batch, mask))
        gradients.backward(segments.sum(out.log_probs), segments)
        return out, gradients.squared_norms()

    def _model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model, as TRL forms them; completions are what is scored."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        labels = ids.masked_fill(attention == 0, -100)
        labels[:, : batch["prompt_ids"].shape[1]] = -100
        inputs = {"input_ids": ids, "attention_mask": attention, "labels": labels, "fused_lm_head": True}
        return inputs | ({"output_router_logits": True} if self.aux_loss_enabled else {})

    # --- the loss ------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss, out = self._known_loss(model, inputs) if "vcpo_c" in inputs else self._one_pass_loss(model, inputs)
        if self.aux_loss_enabled:
            accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * out.aux_loss / accumulated
            mode = "train" if self.model.training else "eval"
            aux = self.accelerator.gather_for_metrics(out.aux_loss.detach()).mean()
            self._metrics[mode]["aux_loss"].append(aux.item())
        return loss

    def _one_pass_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """Of a micro-batch whose groups are whole."""
        if self.args.score_norm == "exact":
            return self._one_exact_pass(model, batch)
        mask = _trained_mask(batch)
        out = model(**self._model_inputs(batch))
        share, _ = self._share(batch, self._token_statistics(out, batch, mask), self._logit_norms(out, mask))
        tokens = mask.shape[1]
        loss = weighted(share.coefficients, out.log_probs[:, -tokens:])
        if share.entropy_coefficients is not None:
            loss = loss + weighted(share.entropy_coefficients, out.entropy[:, -tokens:])
        # Gradients, and the logged loss, are averaged over processes; the window's are sums.
        return (loss - loss.detach() + share.value) * self.accelerator.num_processes, out

    def _one_exact_pass(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """As `_one_pass_loss`, with the parameters' gradients formed here, from what the norms are made of."""
        mask, processes = _trained_mask(batch), self.accelerator.num_processes
        with vk.SequenceGradients(model) as gradients:
            out, norms = self._exact_norms(gradients, model, batch, mask)
            share, sequences = self._share(batch, self._token_statistics(out, batch, mask), norms)
            gradients.accumulate_(sequences * processes)
        # The Trainer's backward has nothing left to do.
        return share.value * processes + torch.zeros_like(share.value, requires_grad=True), out

    def _share(self, batch: dict[str, Any], stats: TokenStatistics, norms: Tensor) -> tuple[MicroBatchLoss, Tensor]:
        """A micro-batch's share of its window's loss, and the coefficients of its sequences [B]. The last one closes the
        window: its backward is still to come.
        """
        opened, config = self._open, self._window_config
        assert opened is not None
        columns = sequence_columns(stats, norms, batch["vcpo_rewards"], batch["vcpo_groups"], config)
        every = gathered_rows(columns, world() if self._way.across else None)
        window = window_of(every.rows, config, opened.counts)
        opened.columns.append(every.rows)
        if opened.complete:
            rows = torch.cat(opened.columns)
            whole = rows if self._way.across else gathered_rows(rows, world()).rows
            self._close(window_of(whole, config), opened.batches, "train")
            self._open = None
        share = micro_batch_loss(stats, window, every.mine, config, self.entropy_coef)
        return share, window.sequences.coefficients[every.mine]

    def _known_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        weights = {"coefficients": _over_prompt(inputs, inputs["vcpo_c"])}
        if "vcpo_h" in inputs:
            weights["entropy_coefficients"] = _over_prompt(inputs, inputs["vcpo_h"])
        out = model(**self._model_inputs(inputs), **weights)
        return out.loss - out.loss.detach() + inputs["vcpo_value"], out

    # --- what is logged ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _close(self, window: Window, batches: list[dict[str, Any]], mode: str) -> None:
        """A whole window: its ESS for the step, its metrics for the log."""
        metrics = window.metrics()
        if mode == "train":
            self._ess_step.observe(window.ess)
            if self.accelerator.is_main_process:
                watch_idleness(self._idle, metrics, batches)
                means = (metrics["log_ratio_abs_mean"], metrics["log_ratio_negative_fraction"])
                warn_of_means(type(self).__name__, metrics["num_tokens"], *means)
        self._log_window(window, metrics, batches, mode)

    def _log_window(
        self, window: Window, of_window: dict[str, float], batches: list[dict[str, Any]], mode: str
    ) -> None:
        metrics = self._metrics[mode]
        for name, value in of_window.items():
            metrics[f"vcpo/{name}"].append(value)
        metrics["entropy"].append(window.token_mean("entropy"))
        if self.beta != 0.0:
            metrics["kl"].append(window.token_mean("kl"))
        if self.log_completions:
            rows = self.accelerator.gather(torch.cat([b["vcpo_rows"] for b in batches]))
            self._log_advantages(rows.tolist(), window.sequences.advantages.tolist())

    def _log_advantages(self, rows: list[int], advantages: list[float]) -> None:
        """VCPO's advantages into the table of completions, whose last entries are the last rows generated."""
        table = self._logs["advantages"]
        first = self._rows_seen - len(table)
        for row, advantage in zip(rows, advantages, strict=True):
            if row >= first:
                table[row - first] = advantage

    def _get_learning_rate(self) -> float:
        """The rate as the last step used it; the scheduler keeps its own."""
        return float(super()._get_learning_rate()) * self._ess_step.scale


def _trained_mask(batch: dict[str, Any]) -> Tensor:
    """[B, C], true where a token is trained on: generated by the model, in a completion that some reward could score."""
    mask = batch["completion_mask"].bool()
    if "tool_mask" in batch:
        mask = mask & batch["tool_mask"].bool()
    scored: Tensor = mask & batch["vcpo_scorable"][:, None]
    return scored


def _over_prompt(batch: dict[str, Any], of_completion: Tensor) -> Tensor:
    """[B, C] -> [B, P + C], 0 over the prompt."""
    return torch.nn.functional.pad(of_completion, (batch["prompt_ids"].shape[1], 0))
