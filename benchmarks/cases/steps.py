"""One optimizer step, generation excluded, of TRL's trainer, of ours, and of plain loops.

A trainer runs in a thread of its own, by its own `train()`, and is let on for one step at a time: what is timed is its loop,
and nothing written after it. Its one generation serves all steps.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vcpo_kernels as vk

GROUP, PROMPTS = 8, 2  # sequences of a prompt, prompts of a step
PROMPT_TOKENS, COMPLETION_TOKENS = 16, 64
SEQUENCES = GROUP * PROMPTS
RATE = 1e-5


@dataclass(frozen=True)
class Work:
    """What every case does a step of. make_model: a fresh causal LM, the same each time. name: as result rows say it."""

    name: str
    make_model: Callable[[], nn.Module]
    make_tokenizer: Callable[[], Any]


def small_llama(vocabulary: int) -> Work:
    """6 layers of 512."""

    def make() -> nn.Module:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config)
        return model

    return Work(f"Llama 6 x 512, V={vocabulary}", make, byte_tokenizer)


def byte_tokenizer() -> Any:
    """Every string is its bytes, which any vocabulary of 258 has."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def smollm2() -> Work:
    from examples.trl_smollm2 import load_model

    return Work("SmolLM2-135M, V=49152", lambda: load_model()[0], lambda: load_model()[1])


@dataclass(frozen=True)
class Batch:
    """[B, T] each but rewards [B]: prompts, then completions, none padded. behavior_logp: as a stale sampler records it."""

    ids: Tensor
    mask: Tensor
    behavior_logp: Tensor
    rewards: Tensor

    @staticmethod
    def of(model: nn.Module) -> Batch:
        draw = torch.Generator().manual_seed(1)
        shape = (SEQUENCES, PROMPT_TOKENS + COMPLETION_TOKENS)
        ids = torch.randint(2, 258, shape, generator=draw)
        ids[:, :PROMPT_TOKENS] = ids[::GROUP, :PROMPT_TOKENS].repeat_interleave(GROUP, 0)
        mask = (torch.arange(shape[1]) >= PROMPT_TOKENS).expand(shape).contiguous()
        with torch.no_grad():
            logp = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        behavior = nn.functional.pad(logp[..., 0], (1, 0)) + 0.02 * torch.randn(shape, generator=draw)
        return Batch(ids, mask, behavior, torch.rand(SEQUENCES, generator=draw))

    def rows(self, rows: slice) -> Batch:
        return Batch(self.ids[rows], self.mask[rows], self.behavior_logp[rows], self.rewards[rows])


# --- trainers -----------------------------------------------------------------------------------------------------------


class TrainerStep:
    """A trainer's own loop, a step at a time."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._over, self._threads = False, torch.get_num_threads()  # which a new thread does not inherit
        self._thread = threading.Thread(target=self._train, args=(make,), daemon=True)
        self._thread.start()
        self._wait()  # until it is about to take its first step

    def __call__(self) -> None:
        self._go.release()
        self._wait()

    def close(self) -> None:
        """End the loop, so that its model is freed."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _train(self, make: Callable[[], Any]) -> None:
        torch.set_num_threads(self._threads)
        try:
            trainer = make()
            trainer.add_callback(self._callback())
            trainer.train()
        except BaseException as error:
            self._error = error
            self._done.release()

    def _callback(self) -> Any:
        import transformers

        step = self

        class OneAtATime(transformers.TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                step._done.release()
                step._go.acquire()
                control.should_training_stop = step._over
                return control

        return OneAtATime()


def trainer_step(work: Work, batch: Batch, rows: int, ours: bool, **options: Any) -> TrainerStep:
    """rows: sequences of a micro-batch. options: of the trainer's configuration."""
    return TrainerStep(lambda: _trainer(work, batch, ours, rows, options))


def _trainer(work: Work, batch: Batch, ours: bool, rows: int, options: dict[str, Any]) -> Any:
    import transformers
    import trl
    from datasets import Dataset

    from vcpo_kernels.integrations.trl import VCPOTrainer, VCPOTrainingConfig

    configuration: Any = VCPOTrainingConfig if ours else trl.GRPOConfig
    of_trl: Any = VCPOTrainer if ours else trl.GRPOTrainer
    config = configuration(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", logging_steps=10**6, save_strategy="no",
        max_steps=10**6, per_device_train_batch_size=rows, gradient_accumulation_steps=SEQUENCES // rows,
        num_generations=GROUP, num_iterations=10**6, max_completion_length=COMPLETION_TOKENS, learning_rate=RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": batch.ids[:, :PROMPT_TOKENS].tolist(),
            "completion_ids": batch.ids[:, PROMPT_TOKENS:].tolist(),
            "logprobs": batch.behavior_logp[:, PROMPT_TOKENS:].tolist(),
        }

    trainer = of_trl(
        model=work.make_model(), args=config, reward_funcs=lambda **columns: batch.rewards.tolist(),
        train_dataset=Dataset.from_dict({"prompt": ["first", "second"]}), processing_class=work.make_tokenizer(),
        rollout_func=rollouts,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# --- plain loops --------------------------------------------------------------------------------------------------------

Loss = Callable[[nn.Module, Batch], "tuple[Tensor, vk.VCPOOutput | None]"]
COUNTS = vk.VCPOConfig(aggregation="token-mean", num_tokens=float(SEQUENCES * COMPLETION_TOKENS))


def plain_step(work: Work, batch: Batch, loss_of: Loss, rows: int) -> Callable[[], None]:
    """rows: sequences of a micro-batch. A loss of this package's scales the step by its ESS."""
    model = work.make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rate = vk.EssLearningRate(optimizer)
    parts = [batch.rows(slice(i, i + rows)) for i in range(0, SEQUENCES, rows)]

    def step() -> None:
        for part in parts:
            loss, out = loss_of(model, part)
            loss.backward()
            if out is not None:
                rate.observe(out)
        optimizer.step()
        optimizer.zero_grad()

    return step


def eager_loss(model: nn.Module, x: Batch) -> tuple[Tensor, None]:
    """Written out as a user would without this package: GRPO's advantages, truncated sequence weights."""
    logits = model(input_ids=x.ids, use_cache=False).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, x.ids[:, 1:, None])[..., 0]
    mask = x.mask[:, 1:].float()
    weight = ((logp.detach() - x.behavior_logp[:, 1:]) * mask).sum(1).exp().clamp(max=8.0)
    groups = x.rewards.view(-1, GROUP)
    advantage = ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-8)).view(-1)
    return -(weight * advantage * (logp * mask).sum(1)).sum() / (SEQUENCES * COMPLETION_TOKENS), None


def logits_loss(model: nn.Module, x: Batch) -> tuple[Tensor, vk.VCPOOutput]:
    logits = model(input_ids=x.ids, use_cache=False).logits
    return _vcpo(vk.token_stats(logits, x.ids, x.mask, shift=True, inplace_backward=True), x)


def fused_loss(model: nn.Module, x: Batch) -> tuple[Tensor, vk.VCPOOutput]:
    with vk.patch_head(model):
        return _vcpo(model(input_ids=x.ids, use_cache=False).token_stats(x.ids, x.mask), x)


def _vcpo(stats: vk.TokenStats, x: Batch) -> tuple[Tensor, vk.VCPOOutput]:
    out = vk.vcpo_loss(stats, x.behavior_logp, x.rewards, GROUP, vk.Segments.padded(x.mask), COUNTS)
    return out.loss, out
