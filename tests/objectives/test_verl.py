"""Against verl's own losses and advantage estimators, called out of its registries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vcpo_kernels as vk
from tests.objectives import ragged
from vcpo_kernels import objectives
from vcpo_kernels.objectives import OBJECTIVES

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed: make test-verl")


def config(**change: Any) -> Any:
    from verl.workers.config import FSDPActorConfig

    if "clip_ratio" in change:  # its defaults for the two sides win over clip_ratio
        change |= {"clip_ratio_low": change["clip_ratio"], "clip_ratio_high": change["clip_ratio"]}
    made = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, **change)
    made.global_batch_info.update({"dp_size": 1})
    return made


def theirs(name: str, batch: ragged.Batch, aggregation: str, by_token: bool = False, **change: Any) -> Tensor:
    mask = ~batch.mu.isnan()
    logp = torch.log_softmax(batch.logits, -1).gather(-1, batch.token_ids[..., None])[..., 0]
    a = batch.token_advantages.nan_to_num() if by_token else batch.advantages[:, None].expand_as(mask)
    function = core_algos.compute_policy_loss_reinforce if name == "reinforce" else core_algos.get_policy_loss_fn(name)
    arguments = {"old_log_prob": batch.mu.nan_to_num(), "log_prob": torch.where(mask, logp, 0.0)}
    if name == "reinforce":
        arguments["rollout_log_prob"] = arguments.pop("old_log_prob")
    loss, _ = function(
        **arguments,
        advantages=a * mask,
        response_mask=mask.double(),
        loss_agg_mode=aggregation,
        config=config(**change),
    )
    return loss


@pytest.mark.parametrize(
    ("name", "change", "aggregation", "by_token", "entry", "knobs"),
    [
        ("vanilla", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}, "token-mean", True, "dapo", {"dual_clip": 3.0}),
        ("vanilla", {"clip_ratio": 0.2, "clip_ratio_c": 1.5}, "seq-mean-token-mean", False, "grpo", {"dual_clip": 1.5}),
        ("vanilla", {"clip_ratio": 0.2}, "seq-mean-token-sum-norm", False, "dr_grpo", {"dual_clip": 3.0, "max_tokens": 8.0}),
        ("vanilla", {"clip_ratio": 0.1}, "seq-mean-token-sum", True, "grpo",
         {"dual_clip": 3.0, "clip_low": 0.1, "clip_high": 0.1, "aggregation": "seq-mean-token-sum"}),
        ("gspo", {"clip_ratio": 0.1}, "seq-mean-token-mean", True, "gspo_token", {"clip_low": 0.1, "clip_high": 0.1}),
        ("gspo", {"clip_ratio": 0.1}, "token-mean", False, "gspo",
         {"clip_low": 0.1, "clip_high": 0.1, "aggregation": "token-mean"}),
        ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}, "seq-mean-token-mean", True, "sapo", {}),
        ("cispo", {"clip_ratio": 0.2}, "token-mean", True, "cispo", {"min_ratio": 0.8, "max_ratio": 1.2}),
        ("dppo_tv", {"clip_ratio": 0.05, "clip_ratio_c": 20.0}, "token-mean", True, "dppo_tv",
         {"divergence_low": 0.05, "divergence_high": 0.05}),
        ("reinforce", {}, "seq-mean-token-sum", True, "rloo", {}),
    ],
)  # fmt: skip
def test_policy_losses(
    name: str, change: dict[str, Any], aggregation: str, by_token: bool, entry: str, knobs: dict[str, Any]
) -> None:
    batch = ragged.make("padded")
    want = theirs(name, batch, aggregation, by_token, **change)
    a = batch.token_advantages if by_token else batch.advantages
    out = OBJECTIVES[entry](batch.stats(), batch.mu, a, batch.segments, **knobs)
    torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-8)  # verl adds 1e-8 to lengths
    ours, verls = (torch.autograd.grad(loss, batch.logits, retain_graph=True)[0] for loss in (out.loss, want))
    torch.testing.assert_close(ours, verls, rtol=1e-6, atol=1e-8)
    assert verls.any()


def test_geometric_mean() -> None:
    """verl's mean is over all rows, empty ones among them; here every row has a token."""
    batch = ragged.make("padded", [4, 1, 2, 3, 6, 2])
    want = theirs("geo_mean", batch, "token-mean", clip_ratio=0.3)
    out = objectives.gmpo(
        batch.stats(), batch.mu, batch.advantages, batch.segments, log_clip_low=0.3, log_clip_high=0.3
    )
    torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-8)
    ours, verls = (torch.autograd.grad(loss, batch.logits, retain_graph=True)[0] for loss in (out.loss, want))
    torch.testing.assert_close(ours, verls, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator: str) -> None:
    from vcpo_kernels.objectives.kl import ESTIMATORS

    logp = torch.randn(20, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(20, dtype=torch.float64)
    want = core_algos.kl_penalty(logp, reference, estimator)
    value, slope = ESTIMATORS[estimator]((logp - reference).detach())
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(want.sum(), logp)[0])


# --- advantages -------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 0.25])
GROUPS = torch.tensor([0, 1, 0, 1, 1, 0])
LENGTHS = [3, 5, 2, 1, 4, 3]


def token_level(batch: ragged.Batch) -> tuple[Tensor, Tensor]:
    """verl's layout: the response from column 0 on, the reward at its last token."""
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).float()
    rewards = torch.zeros(6, 6)
    rewards[torch.arange(6), torch.tensor(LENGTHS) - 1] = REWARDS
    return rewards, mask


@pytest.mark.parametrize(
    ("estimator", "ours"),
    [
        ("grpo", lambda: objectives.group_normalized_advantages(REWARDS, GROUPS, sample_std=True, epsilon=1e-6)),
        ("rloo", lambda: objectives.leave_one_out_advantages(REWARDS, GROUPS)),
        ("opo", lambda: objectives.length_weighted_advantages(REWARDS, GROUPS, torch.tensor(LENGTHS))),
    ],
)
def test_advantage_estimators(estimator: str, ours: Any) -> None:
    rewards, mask = token_level(ragged.make())
    want, _ = core_algos.get_adv_estimator_fn(estimator)(
        token_level_rewards=rewards.clone(), response_mask=mask, index=GROUPS.numpy()
    )
    torch.testing.assert_close(ours()[:, None] * mask, want)


@pytest.mark.parametrize("zero_tail", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_optimal_token_baseline(zero_tail: bool, weighted: bool) -> None:
    rewards, mask = token_level(ragged.make())
    stats = vk.token_stats(torch.randn(6, 6, 7, dtype=torch.float64), torch.randint(0, 7, (6, 6)))
    weights = torch.rand(6, 6, dtype=torch.float64) + 0.5 if weighted else None
    want, _ = core_algos.compute_optimal_token_baseline_advantage(
        token_level_rewards=rewards.double(),
        response_mask=mask.double(),
        index=np.array(GROUPS.tolist()),
        old_log_probs=stats.logp,
        sum_pi_squared=stats.sum_p_squared,
        rollout_is_weights=weights,
        handle_zero_tail=zero_tail,
        epsilon=0.0,
    )
    got = objectives.optimal_token_advantages(
        REWARDS.double(), GROUPS, stats, vk.Segments.padded(mask), token_weights=weights, zero_tail=zero_tail
    )
    torch.testing.assert_close(got, want.nan_to_num())
