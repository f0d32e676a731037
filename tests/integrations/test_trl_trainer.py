"""VCPOTrainer in what people do with GRPOTrainer: KL penalty, adapters, several rewards, masks, evaluation, resuming."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vcpo_kernels as vk
from tests.integrations import trl_setup as setup

CLOSE = 1 - 1e-6


def logged(trainer: Any, key: str = "loss") -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if key in entry]


# --- terms beside the policy gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("recorded", [True, False], ids=["sampler's logp", "no logp"])
def test_the_kl_penalty_is_trls_formula(tmp_path: Path, corrected: bool, recorded: bool) -> None:
    setup.model().save_pretrained(tmp_path / "model")
    rollouts = setup.Rollouts(with_logp=recorded)
    trainer = setup.trainer(
        tmp_path, rollouts, str(tmp_path / "model"), beta=0.3, use_bias_correction_kl=corrected, max_weight=None
    )
    trainer.train()
    reference = setup.float64_copy(trainer.model, trainer.recorder.models[0])
    for step, sequences in enumerate(rollouts.calls):
        policy = setup.float64_copy(trainer.model, trainer.recorder.models[step])
        logps = [setup.token_logp(policy, s) for s in sequences]
        mu = setup.recorded_mu(sequences) if recorded else [x.detach() for x in logps]
        norms = [setup.logit_norm(policy, s) for s in sequences]
        want = setup.expected(policy, sequences, mu, norms, aggregation="token-mean", max_weight=None)
        loss, penalty = torch.zeros((), dtype=torch.float64), []
        for s, c, logp, m in zip(sequences, want.coefficients, logps, mu, strict=True):
            ref = setup.token_logp(reference, s).detach()
            kl = torch.exp(ref - logp) - (ref - logp) - 1
            kl = kl * torch.exp(logp - m) if corrected else kl
            penalty += kl.tolist()
            loss = loss - c * logp.sum() + 0.3 * kl.sum() / want.metrics["num_tokens"]
        loss.backward()
        gradient = {n: p.grad for n, p in policy.named_parameters()}
        assert setup.cosine(trainer.recorder.gradients[step], gradient) > CLOSE
        entry = logged(trainer)[step]
        mean = math.fsum(penalty) / len(penalty)
        assert entry["kl"] == pytest.approx(mean, rel=1e-3, abs=1e-6)
        assert entry["loss"] == pytest.approx(want.loss + 0.3 * mean, rel=1e-3, abs=1e-5)


def test_the_entropy_bonus_is_the_windows_mean(tmp_path: Path) -> None:
    rollouts = setup.Rollouts()
    trainer = setup.trainer(tmp_path, rollouts, max_steps=1, entropy_coef=0.5)
    trainer.train()
    (sequences,) = rollouts.calls
    policy = setup.float64_copy(trainer.model, trainer.recorder.models[0])
    norms = [setup.logit_norm(policy, s) for s in sequences]
    want = setup.expected(policy, sequences, setup.recorded_mu(sequences), norms, aggregation="token-mean")
    entropies = []
    for s, c in zip(sequences, want.coefficients, strict=True):
        logits, _ = setup.token_logits(policy, s)
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        entropies += entropy.tolist()
        (-c * setup.token_logp(policy, s).sum() - 0.5 * entropy.sum() / want.metrics["num_tokens"]).backward()
    gradient = {n: p.grad for n, p in policy.named_parameters()}
    assert setup.cosine(trainer.recorder.gradients[0], gradient) > CLOSE
    (entry,) = logged(trainer)
    mean = math.fsum(entropies) / len(entropies)
    assert entry["entropy"] == pytest.approx(mean, rel=1e-4)
    assert entry["loss"] == pytest.approx(want.loss - 0.5 * mean, rel=1e-3)


def test_a_mixture_of_experts_keeps_its_router_loss(tmp_path: Path) -> None:
    def experts() -> Any:
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=len(setup.tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
            router_aux_loss_coef=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config)

    equal = {"reward_weights": [0.0]}  # equal rewards: all that is left of the gradient is the router's
    with_loss = setup.trainer(tmp_path, base=experts(), max_steps=1, gradient_accumulation_steps=1, **equal)
    with_loss.train()
    without = setup.trainer(
        tmp_path, base=experts(), max_steps=1, gradient_accumulation_steps=1, router_aux_loss_coef=0.0, **equal
    )
    without.train()
    router = "model.layers.0.mlp.gate.weight"
    got, zero = with_loss.recorder.gradients[0][router], without.recorder.gradients[0][router]
    assert logged(with_loss)[0]["aux_loss"] > 0
    assert float(zero.abs().max()) == 0.0
    assert float(got.abs().max()) > 0.0
    assert logged(with_loss)[0]["loss"] == pytest.approx(0.5 * logged(with_loss)[0]["aux_loss"], rel=1e-4)


# --- which sequences and tokens take part -----------------------------------------------------------------------------


def test_rewards_are_the_weighted_sum_of_the_functions(tmp_path: Path) -> None:
    def length(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    rollouts = setup.Rollouts()
    trainer = setup.VCPOTrainer(
        setup.model(), [setup.reward, length], setup.arguments(tmp_path, max_steps=1, reward_weights=[1.0, -0.5]),
        setup.dataset(), processing_class=setup.tokenizer(), rollout_func=rollouts,
    )  # fmt: skip
    trainer.train()
    want = [s.reward - 0.5 * len(s.completion) for s in rollouts.calls[0]]
    assert logged(trainer)[0]["vcpo/reward_mean"] == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_a_completion_that_no_reward_could_score_takes_no_part(tmp_path: Path) -> None:
    """As if it had not been sampled: the other sequences of its group make the baseline, the count is one less."""
    rollouts = setup.Rollouts()

    def picky(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [None if i == 2 else setup.reward_of(ids) for i, ids in enumerate(completion_ids)]

    trainer = setup.trainer(tmp_path, rollouts, max_steps=1)
    trainer.reward_funcs = [picky]
    trainer.train()
    sequences = rollouts.calls[0]
    policy = setup.float64_copy(trainer.model, trainer.recorder.models[0])
    norms = [setup.logit_norm(policy, s) for s in sequences]
    sequences[2].reward = math.nan
    kept = [i for i in range(len(sequences)) if i != 2]
    groups = [i // setup.GROUP for i in kept]
    chosen = [sequences[i] for i in kept]
    with torch.no_grad():
        log_weights = [
            float((setup.token_logp(policy, s) - m).sum())
            for s, m in zip(chosen, setup.recorded_mu(chosen), strict=True)
        ]
    want = setup.brute_force.vcpo(
        log_weights, [len(s.completion) for s in chosen], [s.reward for s in chosen], groups, [norms[i] for i in kept], 2,
        aggregation="token-mean",
    )  # fmt: skip
    gradient = setup.direct_gradient(policy, chosen, want.coefficients)
    assert setup.cosine(trainer.recorder.gradients[0], gradient) > CLOSE
    assert logged(trainer)[0]["vcpo/num_sequences"] == len(kept)


def test_truncated_completions_are_masked_where_asked(tmp_path: Path) -> None:
    class Unfinished(setup.Rollouts):
        def sequence(self, prompt: str, number: int) -> setup.Sequence:
            made = super().sequence(prompt, number)
            if number == 1:
                made.completion[-1] = 5  # no end of sequence
            return made

    for masked in (False, True):
        trainer = setup.trainer(tmp_path, Unfinished(), max_steps=1, mask_truncated_completions=masked)
        trainer.train()
        assert logged(trainer)[0]["vcpo/num_sequences"] == (6 if masked else 8)


@pytest.mark.parametrize("score_norm", ["logit", "exact"])
def test_a_token_that_the_sampler_could_not_score_weighs_nothing_and_an_infinite_weight_drops_its_sequence(
    tmp_path: Path, score_norm: str
) -> None:
    class Broken(setup.Rollouts):
        def sequence(self, prompt: str, number: int) -> setup.Sequence:
            made = super().sequence(prompt, number)
            made.behavior_logp[0] = math.nan if number == 1 else -math.inf if number == 2 else made.behavior_logp[0]
            return made

    rollouts = Broken()
    trainer = setup.trainer(tmp_path, rollouts, max_steps=1, score_norm=score_norm)
    trainer.train()
    sequences = rollouts.calls[0]
    policy = setup.float64_copy(trainer.model, trainer.recorder.models[0])
    mu = setup.recorded_mu(sequences)
    with torch.no_grad():
        mu = [torch.where(m.isnan(), setup.token_logp(policy, s), m) for s, m in zip(sequences, mu, strict=True)]
    norm = setup.logit_norm if score_norm == "logit" else setup.exact_norm
    want = setup.expected(policy, sequences, mu, [norm(policy, s) for s in sequences], aggregation="token-mean")
    gradient = setup.direct_gradient(policy, sequences, want.coefficients)
    assert setup.cosine(trainer.recorder.gradients[0], gradient) > CLOSE
    entry = logged(trainer)[0]
    assert entry["vcpo/nonfinite_sequences"] == 2
    assert entry["vcpo/ess_ratio"] == pytest.approx(want.metrics["ess_ratio"], rel=1e-4)


def test_tokens_of_a_tool_take_no_part(tmp_path: Path) -> None:
    class WithTools(setup.Rollouts):
        def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
            out = super().__call__(prompts, trainer)
            out["env_mask"] = [[1] + [0] + [1] * (len(ids) - 2) for ids in out["completion_ids"]]
            return out

    rollouts = WithTools()
    trainer = setup.trainer(tmp_path, rollouts, max_steps=1, entropy_coef=0.1)
    trainer.train()
    tokens = sum(len(s.completion) - 1 for s in rollouts.calls[0])
    assert logged(trainer)[0]["vcpo/num_tokens"] == tokens


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_norm", ["logit", "exact"])
def test_adapters(tmp_path: Path, score_norm: str) -> None:
    """LoRA with a KL penalty, whose reference is the model without the adapter."""
    peft = pytest.importorskip("peft")
    trainer = setup.VCPOTrainer(
        setup.model(), setup.reward, setup.arguments(tmp_path, score_norm=score_norm, beta=0.1, learning_rate=5.0),
        setup.dataset(), processing_class=setup.tokenizer(), rollout_func=setup.Rollouts(),
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    kl = [entry["kl"] for entry in logged(trainer)]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-6


@pytest.mark.parametrize("score_norm", ["logit", "exact"])
def test_activation_checkpointing_changes_no_gradient(tmp_path: Path, score_norm: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        trainer = setup.trainer(
            tmp_path, max_steps=1, gradient_checkpointing=checkpointing, score_norm=score_norm, beta=0.0
        )
        trainer.train()
        gradients.append(trainer.recorder.gradients[0])
    assert setup.cosine(*gradients) > 1 - 1e-9


def test_a_head_in_fp32_over_a_bf16_model(tmp_path: Path) -> None:
    trainer = setup.trainer(
        tmp_path, base=setup.model().to(torch.bfloat16), max_steps=1, cast_lm_head_to_fp32=True, optim="adamw_torch"
    )
    trainer.train()
    exact = setup.trainer(tmp_path, max_steps=1)
    exact.train()
    got, want = trainer.recorder.gradients[0], exact.recorder.gradients[0]
    assert got["lm_head.weight"].dtype == torch.float32
    x, y = (torch.cat([g[n].double().flatten() for n in sorted(want)]) for g in (got, want))
    assert float(x @ y / (x.norm() * y.norm())) > 0.99


# --- the life of a run ------------------------------------------------------------------------------------------------

SCRIPT = """
from trl import GRPOConfig, GRPOTrainer

def count_vowels(completions, **columns):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]

trainer = GRPOTrainer(
    model=model,
    reward_funcs=count_vowels,
    args=GRPOConfig(
        output_dir=folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4, max_steps=3,
        max_completion_length=6, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False,
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
)
trainer.train()
"""


@pytest.mark.parametrize("switched", [False, True], ids=["GRPO", "VCPO"])
def test_a_grpo_script_runs_with_two_names_changed(tmp_path: Path, switched: bool) -> None:
    script = SCRIPT
    if switched:
        script = script.replace("from trl import", "from vcpo_kernels.integrations.trl import")
        script = re.sub("GRPOConfig", "VCPOTrainingConfig", script)
        script = re.sub("GRPOTrainer", "VCPOTrainer", script)
    names: dict[str, Any] = {
        "model": setup.model(), "tokenizer": setup.tokenizer(), "dataset": setup.dataset(), "folder": str(tmp_path),
    }  # fmt: skip
    exec(script, names)
    trainer = names["trainer"]
    entries = logged(trainer)
    assert trainer.state.global_step == len(entries) == 3
    assert ("vcpo/ess_ratio" in entries[0]) == switched
    if switched:  # it sampled from the policy that it trains: every weight is 1
        assert all(entry["vcpo/ess_ratio"] == pytest.approx(1.0) for entry in entries)
        assert entries[0]["learning_rate"] == pytest.approx(1e-3)


def test_a_run_without_step_scaling_logs_the_schedules_rate(tmp_path: Path) -> None:
    trainer = setup.trainer(tmp_path, ess_rule="none")
    trainer.train()
    assert [entry["learning_rate"] for entry in logged(trainer)] == [0.5] * 3
    assert "vcpo/rate_scale" not in logged(trainer)[0]


def test_the_rule_and_the_reference_of_the_step(tmp_path: Path) -> None:
    trainer = setup.trainer(tmp_path, ess_rule="linear", ess_reference=0.5, max_steps=1)
    trainer.train()
    (entry,) = logged(trainer)
    assert entry["vcpo/rate_scale"] == pytest.approx(min(1.0, entry["vcpo/ess_ratio"] / 0.5), rel=1e-5)


@pytest.mark.parametrize("generations", [1, 2], ids=["on-policy", "two iterations"])
def test_a_resumed_run_continues_to_the_bit(tmp_path: Path, generations: int) -> None:
    """Sampling with the model itself, so that random states count too."""

    def run(folder: Path, resume: str | None = None) -> Any:
        trainer = setup.VCPOTrainer(
            setup.model(), vowels,
            setup.arguments(
                folder, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2,
                lr_scheduler_type="linear", num_iterations=generations, mask_truncated_completions=False,
            ),
            setup.dataset(), processing_class=setup.tokenizer(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, want), got in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(got, want), name
    for key in ("learning_rate", "vcpo/ess_ratio", "vcpo/rate_scale", "loss"):
        assert [e[key] for e in logged(whole)][2:] == [e[key] for e in logged(resumed)][2:], key
    assert logged(whole)[2]["learning_rate"] <= 0.5e-2 + 1e-9


def vowels(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(sum(i % 5 == 0 for i in ids)) for ids in completion_ids]


def test_evaluation_logs_under_its_own_prefix_and_leaves_training_alone(tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        trainer = setup.VCPOTrainer(
            setup.model(), setup.reward, setup.arguments(tmp_path, per_device_eval_batch_size=8, **changes),
            setup.dataset(), eval_dataset=setup.dataset(), processing_class=setup.tokenizer(),
            rollout_func=setup.Rollouts(),
        )  # fmt: skip
        trainer.train()
        return trainer

    plain, evaluated = run(), run(eval_strategy="steps", eval_steps=1, num_generations_eval=2)
    evaluations = logged(evaluated, "eval_loss")
    assert len(evaluations) == 3
    assert 0 < evaluations[0]["eval_vcpo/ess_ratio"] < 1
    for want, got in zip(plain.model.parameters(), evaluated.model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_the_table_of_completions_shows_vcpos_advantages(tmp_path: Path) -> None:
    rollouts = setup.Rollouts()
    trainer = setup.trainer(tmp_path, rollouts, max_steps=1, log_completions=True, num_completions_to_print=0)
    trainer.train()
    policy = setup.float64_copy(trainer.model, trainer.recorder.models[0])
    (sequences,) = rollouts.calls
    norms = [setup.logit_norm(policy, s) for s in sequences]
    want = setup.expected(policy, sequences, setup.recorded_mu(sequences), norms, aggregation="token-mean")
    assert list(trainer._logs["advantages"]) == pytest.approx(want.advantages, rel=1e-3, abs=1e-4)


def test_training_twice_scales_each_step_once(tmp_path: Path) -> None:
    trainer = setup.trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.train()
    hooks = trainer.optimizer.optimizer._optimizer_step_pre_hooks.values()
    assert not any(isinstance(getattr(hook, "__self__", None), vk.EssLearningRate) for hook in hooks)
    entry = logged(trainer)[-1]
    assert entry["learning_rate"] == pytest.approx(0.5 * math.sqrt(entry["vcpo/ess_ratio"]), rel=1e-5)
