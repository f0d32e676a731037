"""vcpo_loss and VCPOConfig: every bad input has its error, by message, and what looks odd but is fine works."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vcpo_kernels as vk
from tests.sequences.vcpo_batches import INF, NAN, VOCABULARY, make


def call(**changes: Any) -> vk.VCPOOutput:
    """vcpo_loss on a healthy batch of four sequences of two tokens, with some arguments changed."""
    logits, ids = torch.zeros(4, 2, VOCABULARY), torch.zeros(4, 2, dtype=torch.int64)
    arguments: dict[str, Any] = {
        "stats": vk.token_stats(logits, ids),
        "behavior_logp": torch.zeros(4, 2),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "groups": 2,
        "segments": vk.Segments.padded(torch.ones(4, 2)),
        "config": None,
    }
    return vk.vcpo_loss(**(arguments | changes))


BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "stats tensor": (
        {"stats": torch.zeros(4, 2)},
        TypeError,
        "stats must be the TokenStats that token_stats returned",
    ),
    "segments mask": (
        {"segments": torch.ones(4, 2)},
        TypeError,
        r"segments must be a Segments.*Segments\.padded\(mask\)",
    ),
    "segments of another batch": (
        {"segments": vk.Segments.padded(torch.ones(4, 3))},
        ValueError,
        r"stats must have the segments' shape \(4, 3\)",
    ),
    "config dict": (
        {"config": {"max_weight": 8.0}},
        TypeError,
        r"config must be a VCPOConfig.*VCPOConfig\(\.\.\.\)",
    ),
    "behaviour None": (
        {"behavior_logp": None},
        TypeError,
        r"behavior_logp must be a torch\.Tensor, got None",
    ),
    "behaviour list": (
        {"behavior_logp": [[0.0] * 2] * 4},
        TypeError,
        r"behavior_logp must be a torch\.Tensor",
    ),
    "behaviour int": (
        {"behavior_logp": torch.zeros(4, 2).long()},
        TypeError,
        "behavior_logp must be one of bfloat16",
    ),
    "behaviour unshifted": (
        {"behavior_logp": torch.zeros(4, 1)},
        ValueError,
        r"behavior_logp must have the segments' shape \(4, 2\)",
    ),
    "behaviour device": (
        {"behavior_logp": torch.zeros(4, 2, device="meta")},
        ValueError,
        "behavior_logp is on meta",
    ),
    "rewards list": (
        {"rewards": [1.0, 0.0, 1.0, 1.0]},
        TypeError,
        r"rewards must be a torch\.Tensor, got \[1\.0",
    ),
    "rewards column": (
        {"rewards": torch.ones(4, 1)},
        ValueError,
        r"rewards must have shape \(4,\) \(one reward per sequence\).*rewards\.reshape\(-1\)",
    ),
    "rewards per token": ({"rewards": torch.ones(4, 2)}, ValueError, "one reward per sequence"),
    "rewards NaN": (
        {"rewards": torch.tensor([1, 0, NAN, 1])},
        ValueError,
        "rewards of sequences with valid tokens must be finite, got nan at index 2",
    ),
    "rewards inf": (
        {"rewards": torch.tensor([1, INF, 0, 1])},
        ValueError,
        "must be finite, got inf at index 1",
    ),
    "rewards device": (
        {"rewards": torch.ones(4, device="meta")},
        ValueError,
        "rewards is on meta but stats is on cpu",
    ),
    "groups list": ({"groups": [0, 0, 1, 1]}, TypeError, r"groups must be an int .*torch\.tensor\(ids\)"),
    "groups not dividing": ({"groups": 3}, ValueError, "groups=3 must divide the 4 sequences"),
    "groups shape": (
        {"groups": torch.zeros(4, 1, dtype=torch.int64)},
        ValueError,
        r"groups must have shape \(4,\)",
    ),
    "groups raw": ({"groups": torch.tensor([11, 11, 12, 12])}, ValueError, r"groups must lie in \[0, 4\)"),
    "groups device": (
        {"groups": torch.zeros(4, dtype=torch.int64, device="meta")},
        ValueError,
        "groups is on meta",
    ),
    "num_groups with int": ({"num_groups": 2}, ValueError, "num_groups=2 goes with group ids"),
    "num_groups str": (
        {"num_groups": "2", "groups": torch.tensor([0, 0, 1, 1])},
        TypeError,
        "num_groups must be an int",
    ),
    "norms shape": (
        {"config": vk.VCPOConfig(score_norm=torch.ones(4, 1))},
        ValueError,
        r"config\.score_norm must have shape \(4,\)",
    ),
    "norms negative": (
        {"config": vk.VCPOConfig(score_norm=-torch.ones(4))},
        ValueError,
        r"config\.score_norm must hold finite values >= 0.*-1\.0 at index 0",
    ),
    "norms NaN": (
        {"config": vk.VCPOConfig(score_norm=torch.tensor([1, NAN, 1, 1]))},
        ValueError,
        "score_norm must hold finite.*nan at index 1",
    ),
    "norms device": (
        {"config": vk.VCPOConfig(score_norm=torch.ones(4, device="meta"))},
        ValueError,
        r"config\.score_norm is on meta",
    ),
}


@pytest.mark.cpu_only("checks read values only on a CPU")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case: str) -> None:
    changes, error, message = BAD_INPUT[case]
    with pytest.raises(error, match="vcpo_loss: .*" + message):
        call(**changes)


def test_packed_token_counts_must_agree() -> None:
    """Packed segments do not know N; two tensors of different N would fail inside the op, unnamed."""
    stats = vk.token_stats(torch.zeros(1, 6, VOCABULARY), torch.zeros(1, 6, dtype=torch.int64))
    seg = vk.Segments.packed(torch.tensor([0, 2, 5]))
    with pytest.raises(
        ValueError, match=r"vcpo_loss: behavior_logp must have shape \(6,\) \(as many tokens as stats\)"
    ):
        vk.vcpo_loss(stats, torch.zeros(5), torch.ones(2), 2, seg)


def test_the_longest_possible_sequence_must_be_known_for_sum_norm() -> None:
    config = vk.VCPOConfig(aggregation="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match=r"needs config\.max_tokens for packed.*VCPOConfig\(max_tokens=\.\.\.\)"):
        make("packed").loss(aggregation="seq-mean-token-sum-norm")
    # Padded: T = 2. Four sequences, weight (1/5)^2, advantage 1.
    assert call(config=config).coefficients[0] == pytest.approx(1 / (4 * 2) / 25)


def test_a_broken_norm_of_a_dropped_sequence_is_no_error() -> None:
    """The exact norm of a sequence with NaN logp is NaN; the sequence is dropped and counted, as for any
    other source.
    """
    mu = torch.zeros(4, 2)
    mu[1] = NAN
    out = call(behavior_logp=mu, config=vk.VCPOConfig(score_norm=torch.tensor([1.0, NAN, 1.0, 1.0])))
    assert out.metrics["nonfinite_sequences"] == 1


def test_untruncated_weights_that_would_overflow_are_dropped_and_counted() -> None:
    """max_weight=None at L = 200: exp would be inf, the loss NaN and every gradient with it."""
    log_w = torch.tensor([0.0, 79.0, 81.0, 200.0])
    logp = torch.zeros(4, 1, requires_grad=True)
    stats = vk.TokenStats(logp, torch.zeros(4, 1), torch.ones(4, 1), torch.zeros(4, 1))
    seg = vk.Segments.padded(torch.ones(4, 1))
    out = vk.vcpo_loss(
        stats, -log_w.unsqueeze(1), torch.tensor([1.0, 0.0, 1.0, 0.0]), 2, seg, vk.VCPOConfig(max_weight=None)
    )
    assert out.metrics["nonfinite_sequences"] == 2
    assert out.coefficients[2:].tolist() == [0.0, 0.0]
    out.loss.backward()
    assert bool(logp.grad.isfinite().all())


BAD_CONFIG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "max_weight zero": ({"max_weight": 0}, ValueError, "max_weight must be finite and > 0, got 0"),
    "max_weight negative": (
        {"max_weight": -1.0},
        ValueError,
        r"max_weight must be finite and > 0, got -1\.0",
    ),
    "max_weight inf": ({"max_weight": INF}, ValueError, "max_weight must be finite"),
    "max_weight NaN": ({"max_weight": NAN}, ValueError, "max_weight must be finite"),
    "max_weight str": (
        {"max_weight": "8"},
        TypeError,
        r"max_weight must be a float > 0 or None, got '8' \(str\)",
    ),
    "max_weight bool": ({"max_weight": True}, TypeError, "max_weight must be a float > 0 or None, got True"),
    "num_sequences tensor": (
        {"num_sequences": torch.tensor(8)},
        TypeError,
        r"num_sequences must be a float.*float\(num_sequences\)",
    ),
    "num_tokens zero": ({"num_tokens": 0}, ValueError, "num_tokens must be finite and > 0"),
    "max_tokens": ({"max_tokens": -3}, ValueError, "max_tokens"),
    "ess_max_weight": ({"ess_max_weight": 0.0}, ValueError, "ess_max_weight"),
    "weighting": (
        {"baseline_weighting": "opob"},
        ValueError,
        "baseline_weighting must be one of 'paper', 'estimator'",
    ),
    "aggregation": (
        {"aggregation": "mean"},
        ValueError,
        "aggregation must be one of 'seq-mean-token-mean'.*got 'mean'",
    ),
    "normalize_std": ({"normalize_std": 1}, TypeError, "normalize_std must be a bool, got 1"),
    "score_norm": (
        {"score_norm": "exact"},
        ValueError,
        r"score_norm must be 'logit' or a tensor \[B\] .*got 'exact'",
    ),
    "score_norm list": ({"score_norm": [1.0]}, ValueError, r"score_norm must be 'logit' or a tensor \[B\]"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_config_is_refused_by_field(case: str) -> None:
    fields, error, message = BAD_CONFIG[case]
    with pytest.raises(error, match="VCPOConfig: " + message):
        vk.VCPOConfig(**fields)


def test_numpy_numbers_are_numbers() -> None:
    """Configs read from YAML by way of numpy, or computed: np.float32(8.0) is not a Python float, and means
    the same.
    """
    np = pytest.importorskip("numpy")
    config = vk.VCPOConfig(
        max_weight=np.float32(8.0),
        ess_max_weight=np.float64(2.0),
        num_sequences=np.int64(4),
        num_tokens=np.int32(8),
        max_tokens=np.float16(2.0),
        normalize_std=np.bool_(True),
    )
    plain = vk.VCPOConfig(ess_max_weight=2.0, num_sequences=4, num_tokens=8, max_tokens=2)
    assert config == plain
    assert torch.equal(call(config=config, groups=np.int64(2)).coefficients, call(config=plain).coefficients)


def test_integers_and_replace() -> None:
    config = dataclasses.replace(vk.VCPOConfig(), max_weight=4, num_sequences=16)
    assert (config.max_weight, config.num_sequences) == (4.0, 16.0)
