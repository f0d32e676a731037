"""Against TRL's own loss: GRPOTrainer._compute_loss, run on a stand-in trainer that holds its settings and nothing else."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.objectives import ragged
from vcpo_kernels import objectives
from vcpo_kernels.objectives import OBJECTIVES, Correction

trl = pytest.importorskip("trl", reason="TRL is not installed (`pip install trl`)")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer  # noqa: E402

LENGTHS = [4, 1, 2, 3, 6, 2]  # none empty: TRL counts empty sequences in its mean, vcpo_kernels does not


class Accelerator:
    """One process."""

    num_processes, sync_gradients = 1, True

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


def settings(**change: Any) -> SimpleNamespace:
    """What _compute_loss reads of a trainer; defaults from TRL's own config, but for what a test changes."""
    config = {f.name: f.default for f in GRPOConfig.__dataclass_fields__.values()} | change
    sampled = config.get("use_vllm", False)
    return SimpleNamespace(
        args=SimpleNamespace(**config | {"steps_per_generation": 1}),
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        _metrics={"train": defaultdict(list)},
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        max_completion_length=config["max_completion_length"],
        epsilon_low=config["epsilon"],
        epsilon_high=config["epsilon"] if config["epsilon_high"] is None else config["epsilon_high"],
        use_vllm=sampled,
        vllm_importance_sampling_correction=sampled,
        _entropy_bonus_enabled=bool(config["entropy_coef"]),
        use_adaptive_entropy=False,
        **{
            key: config[key]
            for key in ("loss_type", "importance_sampling_level", "off_policy_mask_threshold", "beta", "entropy_coef")
        },
    )


def theirs(trainer: Any, batch: ragged.Batch, mask: Tensor, cls: Any = GRPOTrainer, **inputs: Tensor) -> Tensor:
    """TRL's gradient with respect to logits, and its loss."""
    logp = torch.log_softmax(batch.logits, -1)
    chosen = logp.gather(-1, batch.token_ids[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (chosen, entropy, None)
    prompt = torch.zeros(mask.shape[0], 1, dtype=torch.int64)
    filled = {key: value.nan_to_num() for key, value in inputs.items()}
    return cls._compute_loss(
        trainer,
        SimpleNamespace(training=True),
        {
            "prompt_ids": prompt,
            "prompt_mask": prompt + 1,
            "completion_ids": batch.token_ids,
            "completion_mask": mask,
            "advantages": batch.advantages,
            "num_items_in_batch": mask.sum(),
            **filled,
        },
    )


@pytest.fixture
def batch() -> ragged.Batch:
    return ragged.make("padded", LENGTHS)


def mask_of(batch: ragged.Batch) -> Tensor:
    return (~batch.mu.isnan()).double()


def assert_same(ours: objectives.ObjectiveOutput, want: Tensor, batch: ragged.Batch) -> None:
    torch.testing.assert_close(ours.loss, want)
    a, b = (torch.autograd.grad(loss, batch.logits, retain_graph=True)[0] for loss in (ours.loss, want))
    torch.testing.assert_close(a, b)
    assert b.any()


def tokens(loss_type: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """The entry of OBJECTIVES that TRL's loss_type is, and its knobs."""
    norm = {"max_tokens": 256.0} if loss_type == "dr_grpo" else {}
    return loss_type, {**norm, **more}


@pytest.mark.parametrize(
    ("trl_settings", "ours"),
    [
        ({"loss_type": "grpo"}, tokens("grpo")),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, tokens("dapo")),
        ({"loss_type": "bnpo", "epsilon": 0.1}, tokens("bnpo", clip_low=0.1, clip_high=0.1)),
        ({"loss_type": "dr_grpo", "max_completion_length": 256}, tokens("dr_grpo")),
        ({"loss_type": "grpo", "delta": 1.5}, tokens("grpo", dual_clip=1.5)),
        ({"loss_type": "cispo", "epsilon_high": 1.2}, tokens("cispo", max_ratio=1.2)),
        ({"loss_type": "sapo"}, tokens("sapo")),
        ({"loss_type": "vespo"}, tokens("vespo")),
        (
            {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.5},
            tokens("vespo", power_positive=1.0, decay_negative=0.5),
        ),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
            ("gspo", {"clip_low": 0.1, "clip_high": 0.1}),
        ),
        (
            {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1},
            ("gspo", {"clip_low": 0.1, "clip_high": 0.1, "aggregation": "seq-mean-token-sum"}),
        ),
        ({"loss_type": "grpo", "off_policy_mask_threshold": 0.05}, ("opsm", {"threshold": 0.05})),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value[0],
)
def test_loss_types(batch: ragged.Batch, trl_settings: dict[str, Any], ours: tuple[str, dict[str, Any]]) -> None:
    want = theirs(settings(**trl_settings), batch, mask_of(batch), old_per_token_logps=batch.mu)
    name, knobs = ours
    out = OBJECTIVES[name](batch.stats(), batch.mu, batch.advantages, batch.segments, **knobs)
    assert_same(out, want, batch)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo"])
def test_kl_penalty(batch: ragged.Batch, loss_type: str, weighted: bool) -> None:
    trainer = settings(loss_type=loss_type, beta=0.3, use_bias_correction_kl=weighted, epsilon_high=0.28)
    want = theirs(trainer, batch, mask_of(batch), old_per_token_logps=batch.mu, ref_per_token_logps=batch.reference)
    knobs = {} if loss_type == "sapo" else {"clip_high": 0.28}
    out = OBJECTIVES[loss_type](
        batch.stats(), batch.mu, batch.advantages, batch.segments, reference_logp=batch.reference, kl_coefficient=0.3,
        kl_importance_weighted=weighted, **knobs,
    )  # fmt: skip
    assert_same(out, want, batch)
    plain = theirs(
        settings(loss_type=loss_type, epsilon_high=0.28), batch, mask_of(batch), old_per_token_logps=batch.mu
    )
    torch.testing.assert_close(out.metrics["policy_loss"], plain.detach())


def test_entropy_bonus(batch: ragged.Batch) -> None:
    """TRL averages the bonus over tokens, whatever the loss type: as ours with "token-mean"."""
    want = theirs(settings(loss_type="bnpo", entropy_coef=0.1), batch, mask_of(batch), old_per_token_logps=batch.mu)
    out = OBJECTIVES["bnpo"](batch.stats(), batch.mu, batch.advantages, batch.segments, entropy_coefficient=0.1)
    assert_same(out, want, batch)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_sampling_correction(batch: ragged.Batch, mode: str) -> None:
    """TRL's factor pi_old/pi_sampler, computed as it does in _generate_and_score_completions."""
    level, kind = mode.split("_")
    mask = mask_of(batch)
    difference = (batch.proximal - batch.mu).nan_to_num() * mask
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    ratio, (low, high) = difference.exp(), (0.7, 1.5)
    ratio = ratio.clamp(low, high) if kind == "truncate" else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    want = theirs(
        settings(loss_type="grpo", use_vllm=True),
        batch, mask, old_per_token_logps=batch.proximal, importance_sampling_ratio=ratio,
    )  # fmt: skip
    out = OBJECTIVES["grpo"](
        batch.stats(), batch.mu, batch.advantages, batch.segments, proximal_logp=batch.proximal,
        correction=Correction(kind, level, low, high),
    )  # fmt: skip
    assert_same(out, want, batch)
    as_weights = ratio.expand_as(mask) if level == "token" else ratio.squeeze(-1)
    by_hand = OBJECTIVES["grpo"](
        batch.stats(), batch.proximal, batch.advantages, batch.segments, token_weights=as_weights
    )
    torch.testing.assert_close(by_hand.coefficients, out.coefficients)


def test_off_policy_mask_with_a_sampler_of_its_own(batch: ragged.Batch) -> None:
    """The mask is against the sampler, the ratio against the old policy."""
    want = theirs(
        settings(loss_type="grpo", off_policy_mask_threshold=0.02),
        batch, mask_of(batch), old_per_token_logps=batch.proximal, sampling_per_token_logps=batch.mu,
    )  # fmt: skip
    out = objectives.opsm(
        batch.stats(), batch.mu, batch.advantages, batch.segments, threshold=0.02, proximal_logp=batch.proximal
    )
    assert 0 < out.metrics["masked_fraction"] < 1
    assert_same(out, want, batch)


def test_gmpo(batch: ragged.Batch) -> None:
    trainer = settings(epsilon=0.3, epsilon_high=0.2)
    want = theirs(trainer, batch, mask_of(batch), GMPOTrainer, old_per_token_logps=batch.mu)
    out = objectives.gmpo(
        batch.stats(), batch.mu, batch.advantages, batch.segments, log_clip_low=0.3, log_clip_high=0.2
    )
    assert_same(out, want, batch)


def test_advantages() -> None:
    """TRL's scale_rewards="group": (r - mean) / (std + 1e-4) with the sample's deviation."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 3.0, 3.0, 3.0, 3.0])
    grouped = rewards.view(-1, 4)
    want = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    got = objectives.group_normalized_advantages(rewards, 4, sample_std=True, epsilon=1e-4)
    torch.testing.assert_close(got, want.flatten())
    assert not got[4:].any()


def test_ess_of_a_batch_is_that_of_its_sequences(batch: ragged.Batch) -> None:
    out = OBJECTIVES["dapo"](batch.stats(), batch.mu, batch.advantages, batch.segments)
    log_w = ((batch.stats().logp.detach() - batch.mu).nan_to_num() * mask_of(batch)).sum(-1)
    torch.testing.assert_close(out.log_weights, log_w)
    w = log_w.exp()
    torch.testing.assert_close(out.ess, w.sum() ** 2 / (w**2).sum())
    assert not math.isclose(float(out.ess), 6.0)
    torch.testing.assert_close(vk.effective_sample_size(log_w).ratio, out.ess_ratio)
