"""Bad arguments are named, with what they were, what is wanted and how to fix it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vcpo_kernels as vk
from tests.objectives import ragged
from vcpo_kernels import objectives
from vcpo_kernels.objectives import OBJECTIVES, Correction


def call(name: str = "grpo", **change: Any) -> objectives.ObjectiveOutput:
    batch = ragged.make("padded")
    arguments = {
        "stats": batch.stats(),
        "behavior_logp": batch.mu,
        "advantages": batch.advantages,
        "segments": batch.segments,
    }
    return OBJECTIVES[name](**{**arguments, **change})


BATCH = ragged.make("padded")
SHAPE = tuple(BATCH.mu.shape)
PACKED = ragged.make("packed")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stats": BATCH.mu}, TypeError, r"ppo_clip: stats must be the TokenStats that token_stats returned"),
        ({"segments": torch.ones(6, 8)}, TypeError, r"ppo_clip: segments must be a Segments.*Segments.padded\(mask\)"),
        ({"behavior_logp": None}, TypeError, r"ppo_clip: behavior_logp must be a torch.Tensor, got None"),
        ({"behavior_logp": torch.zeros(6, 7)}, ValueError, r"behavior_logp must have the segments' shape \(6, 8\)"),
        (
            {"behavior_logp": torch.zeros(6, 8).long()},
            TypeError,
            r"behavior_logp must be one of .*behavior_logp.float\(\)",
        ),
        ({"advantages": [1.0]}, TypeError, r"ppo_clip: advantages must be a torch.Tensor"),
        (
            {"advantages": torch.ones(6, 1)},
            ValueError,
            r"advantages must be \[6\] \(one per sequence\) or have the shape of stats.logp, \(6, 8\).*reshape\(-1\)",
        ),
        (
            {"advantages": torch.full((6,), math.nan)},
            ValueError,
            r"advantages of valid tokens must be finite, got nan at flat",
        ),
        (
            {"aggregation": "mean"},
            ValueError,
            r"ppo_clip: aggregation must be one of 'seq-mean-token-mean', .*got 'mean'",
        ),
        ({"kl_estimator": "k4"}, ValueError, r"ppo_clip: kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        ({"kl_importance_weighted": 1}, TypeError, r"kl_importance_weighted must be a bool, got 1"),
        ({"kl_coefficient": 0.1}, ValueError, r"kl_coefficient=0.1 needs reference_logp"),
        ({"kl_coefficient": -0.1}, ValueError, r"kl_coefficient must be finite and >= 0, got -0.1"),
        ({"entropy_coefficient": math.nan}, ValueError, r"entropy_coefficient must be finite, got nan"),
        (
            {"entropy_coefficient": torch.ones(())},
            TypeError,
            r"entropy_coefficient must be a number, got a float32 tensor",
        ),
        (
            {"kl_coefficient": 0.1, "reference_logp": torch.zeros(3)},
            ValueError,
            r"reference_logp must have the segments' shape",
        ),
        ({"num_tokens": 0}, ValueError, r"ppo_clip: num_tokens must be finite and > 0, got 0"),
        ({"num_sequences": "8"}, TypeError, r"ppo_clip: num_sequences must be a float > 0 or None, got '8'"),
        ({"ess_max_weight": -1.0}, ValueError, r"ess_max_weight must be finite and > 0"),
        ({"token_weights": torch.ones(2)}, ValueError, r"token_weights must have the segments' shape"),
        ({"token_weights": torch.ones(6).bool()}, TypeError, r"token_weights must be one of .*token_weights.float\(\)"),
        ({"correction": Correction()}, ValueError, r"correction weighs by pi_prox/mu and needs proximal_logp"),
        (
            {"correction": 2.0, "proximal_logp": BATCH.proximal},
            TypeError,
            r"correction must be a Correction, got 2.0 .*objectives.Correction\(",
        ),
        ({"proximal_logp": torch.zeros(6, 7)}, ValueError, r"proximal_logp must have the segments' shape"),
        (
            {"epsilon": 0.2},
            TypeError,
            r"ppo_clip: unknown argument 'epsilon'. Beside the method's own it takes num_seq",
        ),
        ({"clip_low": -0.1}, ValueError, r"ppo_clip: clip_low must be finite and >= 0, got -0.1"),
        ({"clip_high": "0.2"}, TypeError, r"ppo_clip: clip_high must be a number, got '0.2'"),
        ({"dual_clip": 1.1}, ValueError, r"dual_clip must be > 1 \+ clip_high = 1.2, got 1.1"),
        ({"dual_clip": -3}, ValueError, r"ppo_clip: dual_clip must be finite and > 0"),
    ],
)
def test_common_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**change)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "token_truncated_is",
            {"max_weight": 0},
            ValueError,
            r"token_truncated_is: max_weight must be finite and > 0, got 0",
        ),
        (
            "sequence_masked_is",
            {"max_weight": 1.0, "min_weight": 2.0},
            ValueError,
            r"sequence_masked_is: min_weight must be <= max_weight, got min_weight=2.0 and max_weight=1.0",
        ),
        ("cispo", {"min_ratio": 9.0}, ValueError, r"cispo: min_ratio must be <= max_ratio"),
        ("icepop", {"min_weight": -0.5}, ValueError, r"icepop: min_weight must be finite and > 0"),
        ("opsm", {"threshold": -1}, ValueError, r"opsm: threshold must be finite and >= 0"),
        ("m2po", {"threshold": 0.0}, ValueError, r"m2po: threshold must be finite and > 0"),
        ("m2po", {"trust_region_only": 1}, TypeError, r"m2po: trust_region_only must be a bool"),
        ("dppo_tv", {"divergence_low": math.inf}, ValueError, r"dppo_tv: divergence_low must be finite and >= 0"),
        ("dppo_tv", {"max_ratio": 0.0}, ValueError, r"dppo_tv: max_ratio must be finite and > 0"),
        ("sapo", {"temperature_positive": 0.0}, ValueError, r"sapo: temperature_positive must be finite and > 0"),
        ("vespo", {"power_negative": -1.0}, ValueError, r"vespo: power_negative must be finite and >= 0"),
        ("gmpo", {"log_clip_low": -0.4}, ValueError, r"gmpo: log_clip_low must be finite and >= 0"),
        ("topr", {"positive_range": 1.0}, TypeError, r"topr: positive_range must be a pair \(low, high\), got 1.0"),
        ("topr", {"negative_range": (1.0, 0.0)}, ValueError, r"topr: negative_range must ascend, got \(1.0, 0.0\)"),
        ("topr", {"positive_range": (0.0, math.inf)}, ValueError, r"topr: positive_range\[1\] must be finite and >= 0"),
    ],
)
def test_knobs(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(name, **change)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "topr", "vespo"])
def test_methods_of_whole_sequences_refuse_advantages_by_token(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: advantages must be \[6\], one per sequence"):
        call(name, advantages=BATCH.token_advantages)


def test_gspo_says_where_token_advantages_go() -> None:
    with pytest.raises(ValueError, match="Use gspo_token for advantages by token"):
        call("gspo", advantages=BATCH.token_advantages)


@pytest.mark.parametrize("name", ["reinforce", "m2po", "topr", "vespo", "dppo_tv", "token_truncated_is"])
def test_methods_without_a_proximal_policy_say_so(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: unknown argument 'proximal_logp'"):
        call(name, proximal_logp=BATCH.proximal)


def test_dr_grpo_needs_a_length_where_the_layout_has_none() -> None:
    with pytest.raises(ValueError, match=r"'seq-mean-token-sum-norm' needs max_tokens for packed and indexed segments"):
        OBJECTIVES["dr_grpo"](PACKED.stats(), PACKED.mu, PACKED.advantages, PACKED.segments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "clip"}, ValueError, r"Correction: mode must be one of 'truncate', 'mask', got 'clip'"),
        ({"level": "batch"}, ValueError, r"Correction: level must be one of 'token', 'sequence', got 'batch'"),
        ({"maximum": -1.0}, ValueError, r"Correction: maximum must be finite and > 0"),
        ({"minimum": 3.0}, ValueError, r"Correction: minimum must be <= maximum, got minimum=3.0 and maximum=2.0"),
    ],
)
def test_correction(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Correction(**arguments)


REWARDS = torch.tensor([1.0, 0.0, 2.0, 1.0])
STATS = vk.token_stats(torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.long))
SEGMENTS = vk.Segments.padded(torch.ones(4, 2))


@pytest.mark.parametrize(
    ("function", "arguments", "keywords", "error", "message"),
    [
        ("group_mean_advantages", ([1.0], 2), {}, TypeError, r"group_mean_advantages: rewards must be a torch.Tensor"),
        ("group_mean_advantages", (REWARDS[None], 2), {}, ValueError, r"rewards must be \[B\].*reshape\(-1\)"),
        ("group_mean_advantages", (REWARDS, 3), {}, ValueError, r"groups=3 must divide the 4 sequences"),
        (
            "group_mean_advantages",
            (REWARDS / 0, 2),
            {},
            ValueError,
            r"rewards of sequences with valid tokens must be finite",
        ),
        ("group_mean_advantages", (REWARDS, 2), {"valid": torch.ones(3)}, ValueError, r"valid must have shape \(4,\)"),
        (
            "leave_one_out_advantages",
            (REWARDS, torch.tensor([0, 0, 1, 9])),
            {},
            ValueError,
            r"groups must lie in \[0, 4\)",
        ),
        (
            "group_normalized_advantages",
            (REWARDS, 2),
            {"epsilon": -1.0},
            ValueError,
            r"epsilon must be finite and >= 0",
        ),
        ("group_normalized_advantages", (REWARDS, 2), {"sample_std": 1}, TypeError, r"sample_std must be a bool"),
        ("length_weighted_advantages", (REWARDS, 2, [1]), {}, TypeError, r"lengths must be a torch.Tensor"),
        ("length_weighted_advantages", (REWARDS, 2, torch.ones(3)), {}, ValueError, r"lengths must have shape \(4,\)"),
        (
            "opob_advantages",
            (REWARDS, 2, torch.zeros(3), REWARDS),
            {},
            ValueError,
            r"log_weights must have shape \(4,\)",
        ),
        (
            "opob_advantages",
            (REWARDS, 2, REWARDS.long(), REWARDS),
            {},
            TypeError,
            r"log_weights must be one of float32",
        ),
        (
            "opob_advantages",
            (REWARDS, 2, REWARDS, -REWARDS),
            {},
            ValueError,
            r"score_sqnorm must hold finite values >= 0",
        ),
        ("optimal_token_advantages", (REWARDS, 2, REWARDS, SEGMENTS), {}, TypeError, r"stats must be the TokenStats"),
        ("optimal_token_advantages", (REWARDS, 2, STATS, None), {}, TypeError, r"segments must be a Segments"),
        (
            "optimal_token_advantages",
            (REWARDS[:3], 2, STATS, SEGMENTS),
            {},
            ValueError,
            r"rewards must have shape \(4,\)",
        ),
        (
            "optimal_token_advantages",
            (REWARDS / 0, 2, STATS, SEGMENTS),
            {},
            ValueError,
            r"rewards of sequences with valid",
        ),
        (
            "optimal_token_advantages",
            (REWARDS, 2, STATS, SEGMENTS),
            {"token_weights": torch.full((4, 2), math.inf)},
            ValueError,
            r"token_weights \(and stats.score_sqnorm\) must be finite at valid tokens",
        ),
    ],
)
def test_advantages(
    function: str, arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(objectives, function)(*arguments, **keywords)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (
            lambda t: t.advantages,
            TypeError,
            r"mine: rule must return TokenTerms\(coefficients, ...\), got a float64 tensor",
        ),
        (
            lambda t: objectives.TokenTerms(1.0),
            TypeError,
            r"mine: the rule's coefficients must be a torch.Tensor, got 1.0",
        ),
        (
            lambda t: objectives.TokenTerms(t.advantages[:2]),
            ValueError,
            r"mine: the rule's coefficients must have shape \(48,\) \(one value per token, as tokens.logp\)",
        ),
        (
            lambda t: objectives.TokenTerms(t.advantages, metrics={"mean_ratio": t.ratio.mean()}),
            ValueError,
            r"mine: the rule's mean_ratio must have shape \(48,\)",
        ),
    ],
)
def test_a_users_rule(rule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        objectives.objective_from_coefficients("mine", rule, BATCH.stats(), BATCH.mu, BATCH.advantages, BATCH.segments)
