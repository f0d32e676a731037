"""The gradient of an optimizer step is the direct formula's, over the whole window, under the parameters it is taken at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import trl_setup as setup

CLOSE = 1 - 1e-6


def check_step(
    trainer: Any,
    step: int,
    sequences: list[setup.Sequence],
    mu: list[torch.Tensor],
    exact: bool = False,
    **options: Any,
) -> Any:
    policy = setup.float64_copy(trainer.model, trainer.recorder.models[step])
    temperature = options.get("temperature", 1.0)
    if exact:
        norms = [setup.exact_norm(policy, s) for s in sequences]
    else:
        norms = [setup.logit_norm(policy, s, temperature) for s in sequences]
    want = setup.expected(policy, sequences, mu, norms, **options)
    gradient = setup.direct_gradient(policy, sequences, want.coefficients, temperature)
    assert setup.cosine(trainer.recorder.gradients[step], gradient) > CLOSE
    return want


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_steps_of_a_sampler_that_recorded_its_logp(tmp_path: Path, accumulation: int) -> None:
    rollouts = setup.Rollouts()
    trainer = setup.trainer(
        tmp_path, rollouts, per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    assert len(rollouts.calls) == trainer.state.global_step == 3
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, sequences in enumerate(rollouts.calls):
        want = check_step(trainer, step, sequences, setup.recorded_mu(sequences), aggregation="token-mean")
        entry = logged[step]
        for name in ("ess", "ess_ratio", "num_tokens", "truncated_fraction", "log_weight_max", "equal_reward_fraction"):
            assert entry[f"vcpo/{name}"] == pytest.approx(want.metrics[name], rel=1e-3, abs=1e-6), name
        assert entry["loss"] == pytest.approx(want.loss, rel=1e-3, abs=1e-6)
        assert entry["vcpo/rate_scale"] == pytest.approx(math.sqrt(want.metrics["ess_ratio"]), rel=1e-3)
        assert entry["learning_rate"] == pytest.approx(0.5 * math.sqrt(want.metrics["ess_ratio"]), rel=1e-3)


def test_the_step_that_is_taken_is_the_scaled_one(tmp_path: Path) -> None:
    trainer = setup.trainer(tmp_path, max_steps=2)
    trainer.train()
    before, after = trainer.recorder.models
    rate = next(e for e in trainer.state.log_history if "loss" in e)["learning_rate"]
    assert 0 < rate < 0.4
    for name, gradient in trainer.recorder.gradients[0].items():
        torch.testing.assert_close(after[name], before[name] - rate * gradient)
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.5}  # the schedule is the scheduler's


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo", "baseline_weighting": "estimator", "max_weight": 2.0},
        {"loss_type": "dr_grpo", "scale_rewards": False},
        {"aggregation": "seq-mean-token-sum", "baseline_weighting": "official", "max_weight": None},
        {"temperature": 0.7, "baseline_weighting": "mean"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_switch_of_the_loss(tmp_path: Path, changes: dict[str, Any]) -> None:
    rollouts = setup.Rollouts()
    trainer = setup.trainer(tmp_path, rollouts, max_steps=1, **changes)
    trainer.train()
    options = {k: changes[k] for k in ("max_weight", "baseline_weighting", "temperature") if k in changes}
    options["aggregation"] = trainer.args.token_aggregation
    check_step(
        trainer, 0, rollouts.calls[0], setup.recorded_mu(rollouts.calls[0]),
        normalize_std=changes.get("scale_rewards", True), max_tokens=8.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("model_changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_exact_norms(tmp_path: Path, model_changes: dict[str, Any]) -> None:
    rollouts = setup.Rollouts()
    trainer = setup.trainer(tmp_path, rollouts, setup.model(**model_changes), max_steps=2, score_norm="exact")
    trainer.train()
    for step, sequences in enumerate(rollouts.calls):
        check_step(trainer, step, sequences, setup.recorded_mu(sequences), exact=True, aggregation="token-mean")


def test_a_generation_used_twice_is_weighed_anew_each_step(tmp_path: Path) -> None:
    """num_iterations=2, nothing recorded by the sampler: mu is the trainer's own, of when it sampled."""
    rollouts = setup.Rollouts(with_logp=False)
    trainer = setup.trainer(tmp_path, rollouts, num_iterations=2, max_steps=4, learning_rate=2.0)
    trainer.train()
    assert len(rollouts.calls) == 2
    for step in range(4):
        sequences = rollouts.calls[step // 2]
        sampler = setup.float64_copy(trainer.model, trainer.recorder.models[step // 2 * 2])
        with torch.no_grad():
            mu = [setup.token_logp(sampler, s) for s in sequences]
        want = check_step(trainer, step, sequences, mu, aggregation="token-mean")
        ratio = want.metrics["ess_ratio"]
        assert ratio < 0.999 if step % 2 else ratio == pytest.approx(1.0)


def test_a_window_that_is_a_part_of_a_generation_holds_whole_groups(tmp_path: Path) -> None:
    """steps_per_generation=4, two micro-batches a step: the second window is stale, and has groups of its own."""
    rollouts = setup.Rollouts(with_logp=False)
    trainer = setup.trainer(tmp_path, rollouts, steps_per_generation=4, max_steps=4, learning_rate=2.0)
    trainer.train()
    assert [len(c) for c in rollouts.calls] == [16, 16]
    for step in range(4):
        sequences = rollouts.calls[step // 2][8 * (step % 2) : 8 * (step % 2) + 8]
        sampler = setup.float64_copy(trainer.model, trainer.recorder.models[step // 2 * 2])
        with torch.no_grad():
            mu = [setup.token_logp(sampler, s) for s in sequences]
        want = check_step(trainer, step, sequences, mu, aggregation="token-mean")
        assert (want.metrics["ess_ratio"] < 0.999) == bool(step % 2)


def test_a_window_over_two_generations(tmp_path: Path) -> None:
    """steps_per_generation=1, two micro-batches a step: the second is generated with the first, by the same parameters."""
    rollouts = setup.Rollouts()
    trainer = setup.trainer(tmp_path, rollouts, steps_per_generation=1, max_steps=2)
    trainer.train()
    assert len(rollouts.calls) == 4
    for step in range(2):
        sequences = rollouts.calls[2 * step] + rollouts.calls[2 * step + 1]
        check_step(trainer, step, sequences, setup.recorded_mu(sequences), aggregation="token-mean")
