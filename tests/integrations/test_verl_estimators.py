"""The estimators registered with verl, against loops over prompts in float64. They run without verl."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vcpo_kernels.integrations import verl as plugin

UIDS = np.array(["p", "q", "p", "q", "p", "lone"], dtype=object)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Six responses of up to five tokens, outcome reward on the last; what lies in the padding is no one's business."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 3, 2, 4, 5, 1])
    mask = torch.arange(5) < lengths[:, None]
    rewards = torch.zeros(6, 5, dtype=torch.float64)
    rewards[torch.arange(6), lengths - 1] = torch.rand(6, generator=generator, dtype=torch.float64)
    old, rollout = (-torch.rand(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    sum_p_squared = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    return {
        "token_level_rewards": rewards,
        "response_mask": mask.double(),
        "old_log_probs": torch.where(mask, old, math.nan),
        "rollout_log_probs": torch.where(mask, rollout, math.nan),
        "sum_pi_squared": torch.where(mask, sum_p_squared, math.nan),
    }


def expected(batch: dict[str, torch.Tensor], norms: str, normalize: bool) -> list[float]:
    """Sequence by sequence, as the paper writes it, with weights that are formed outright."""
    result = [0.0] * 6
    for uid in set(UIDS.tolist()):
        members = [i for i in range(6) if UIDS[i] == uid]
        reward, weight = {}, {}
        for i in members:
            live = [t for t in range(5) if batch["response_mask"][i, t]]
            old, rollout = batch["old_log_probs"][i], batch["rollout_log_probs"][i]
            ratio = math.exp(sum(float(old[t] - rollout[t]) for t in live))
            scores = [1 - 2 * math.exp(old[t]) + float(batch["sum_pi_squared"][i, t]) for t in live]
            weight[i] = ratio**2 * (sum(max(s, 0.0) for s in scores) if norms == "logit" else len(live))
            reward[i] = float(batch["token_level_rewards"][i].sum())
        baseline = sum(weight[i] * reward[i] for i in members) / sum(weight.values())
        mean = sum(reward.values()) / len(members)
        std = math.sqrt(sum((reward[i] - mean) ** 2 for i in members) / len(members))
        for i in members:
            result[i] = 0.0 if std == 0 else (reward[i] - baseline) / (std if normalize else 1.0)
    return result


@pytest.mark.parametrize("norms", ["logit", "length"])
@pytest.mark.parametrize("normalize", [True, False])
def test_opob_is_the_papers_formula(norms: str, normalize: bool) -> None:
    """Uneven groups in any order; a prompt with one sample gets zero; NaN padding reaches nothing."""
    batch = inputs()
    config = {"norm_adv_by_std_in_grpo": normalize, "rollout_correction": {"bypass_mode": False}}
    if norms == "length":
        del batch["sum_pi_squared"]
        advantages, returns = plugin.opob_length(index=UIDS, config=config, **batch)
        batch["sum_pi_squared"] = torch.zeros(6, 5)
    else:
        advantages, returns = plugin.opob(index=UIDS, config=config, **batch)
    wanted = torch.tensor(expected(batch, norms, normalize), dtype=torch.float64)
    torch.testing.assert_close(advantages, torch.where(batch["response_mask"] > 0, wanted[:, None], 0.0))
    assert torch.equal(advantages, returns)
    assert advantages[5].tolist() == [0.0] * 5


def test_a_broken_norm_is_that_of_its_sequence_alone() -> None:
    batch = inputs()
    batch["sum_pi_squared"][0, 1] = math.nan
    advantages, _ = plugin.opob(index=UIDS, **batch)
    assert not advantages[0].any()
    assert advantages.isfinite().all()
    assert advantages[2].any()


def test_rejected_tokens_keep_their_sequences_reward() -> None:
    """Rejection sampling masks tokens, among them the last, which carries the reward."""
    batch = inputs()
    batch["response_mask"][0, 4] = 0
    advantages, _ = plugin.opob(index=UIDS, **batch)
    assert advantages[0, :4].abs().min() > 0
    assert advantages[0, 4] == 0
    wanted = torch.tensor(expected(batch, "logit", True), dtype=torch.float64)
    torch.testing.assert_close(advantages[:, 0], wanted)


def test_missing_inputs_are_named() -> None:
    batch = inputs()
    for name in ("old_log_probs", "rollout_log_probs", "sum_pi_squared"):
        with pytest.raises(ValueError, match=f"verl handed over no {name}. Call .*hand_over_log_probs"):
            plugin.opob(index=UIDS, **{**batch, name: None})
    with pytest.raises(ValueError, match="handed over no index"):
        plugin.opob(**batch)
    with pytest.raises(ValueError, match="bypass_mode=True old_log_probs are the sampler's"):
        plugin.opob(index=UIDS, config={"rollout_correction": {"bypass_mode": True}}, **batch)
    batch["token_level_rewards"][1, 0] = math.nan
    with pytest.raises(ValueError, match=r"opob \(verl\): rewards of sequences with valid tokens must be finite"):
        plugin.opob(index=UIDS, **batch)


def test_register_says_that_verl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="needs verl"):
        plugin.register()
    with pytest.raises(ImportError, match="none of verl's trainers can be imported"):
        plugin.hand_over_log_probs()
