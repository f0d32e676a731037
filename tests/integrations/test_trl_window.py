"""The parts of the window by themselves: whose log mu counts, dropped sequences meet no product, set-ups that are refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations import trl_setup as setup
from tests.sequences import brute_force
from vcpo_kernels.integrations.trl import window as w
from vcpo_kernels.integrations.trl.support import check_support, check_whole

NAN = math.nan


@pytest.mark.parametrize(
    ("sampling", "old", "correct_sampler", "want"),
    [
        (None, None, True, [-1.0, -2.0]),
        (None, [-3.0, -4.0], True, [-3.0, -4.0]),
        ([-5.0, -6.0], [-3.0, -4.0], True, [-5.0, -6.0]),
        ([-5.0, NAN], [-3.0, -4.0], True, [-5.0, -4.0]),
        ([-5.0, NAN], None, True, [-5.0, -2.0]),
        ([-5.0, -6.0], [-3.0, -4.0], False, [-3.0, -4.0]),
        ([-5.0, -6.0], None, False, [-1.0, -2.0]),
    ],
)
def test_whose_logp_is_mu(sampling: Any, old: Any, correct_sampler: bool, want: list[float]) -> None:
    given = [None if x is None else torch.tensor([x]) for x in (sampling, old)]
    got = w.behavior_logp(torch.tensor([[-1.0, -2.0]]), *given, correct_sampler)
    assert got.tolist() == [want]


def config(**changes: Any) -> w.WindowConfig:
    defaults = {
        "max_weight": 8.0, "baseline_weighting": "paper", "aggregation": "token-mean", "normalize_std": True,
        "ess_max_weight": None, "max_tokens": 5.0,
    }  # fmt: skip
    return w.WindowConfig(**{**defaults, **changes})


def test_a_window_of_unequal_groups_in_any_order() -> None:
    """Groups are told by their numbers, which need be neither consecutive nor small; one sequence has no token."""
    big_l, n, r = [0.5, -1.0, 3.0, 0.0, NAN, 0.2], [2.0, 1.0, 0.5, 3.0, 1.0, 1.0], [1.0, 0.0, 2.0, 1.0, 0.0, 0.5]
    group, lengths = [900001, 7, 7, 900001, 900001, 7], [3, 5, 2, 4, 3, 0]
    known = {"log_weights": big_l, "score_norms": n, "reward": r, "group": group, "lengths": lengths}
    columns = torch.tensor([known.get(name, [0.0] * 6) for name in w.COLUMNS], dtype=torch.float64).T
    got = w.window_of(columns, config(aggregation="seq-mean-token-mean"))
    want = brute_force.vcpo(big_l, lengths, r, [int(g > 7) for g in group], n, 2, aggregation="seq-mean-token-mean")
    assert got.sequences.coefficients.tolist() == pytest.approx(want.coefficients, rel=1e-5)
    metrics = got.metrics()
    assert {k: metrics[k] for k in want.metrics} == pytest.approx(want.metrics, rel=1e-5)
    assert metrics["baseline_mean"] == pytest.approx(sum(want.baselines) / 2, rel=1e-5)
    assert (got.scale == 0).tolist() == [False, False, False, False, True, True]


def test_a_dropped_sequence_puts_no_nan_into_coefficients_or_value() -> None:
    logp = torch.tensor([[-1.0, -2.0], [NAN, -1.0], [-1.0, -1.0], [-2.0, -1.5]])
    stats = w.TokenStatistics(
        torch.ones(4, 2, dtype=torch.bool), logp, logp.abs(), logp - 0.1, torch.full((4, 2), -1.2)
    )
    settings = config(beta=0.5)
    columns = w.sequence_columns(stats, torch.ones(4), torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.zeros(4), settings)
    window = w.window_of(columns, settings)
    share = w.micro_batch_loss(stats, window, slice(0, 4), settings, entropy_coef=0.1)
    assert share.coefficients.isfinite().all()
    assert share.entropy_coefficients is not None
    assert share.value.isfinite()
    assert not share.coefficients[1].any()
    assert not share.entropy_coefficients[1].any()
    assert math.isfinite(window.token_mean("kl"))


def test_a_reference_far_off_stays_in_range() -> None:
    logp = torch.tensor([[-200.0, -1.0], [-1.0, -1.0]])
    stats = w.TokenStatistics(torch.ones(2, 2, dtype=torch.bool), logp, -logp, logp, torch.zeros(2, 2))
    for correction in (True, False):
        settings = config(beta=0.1, kl_correction=correction)
        columns = w.sequence_columns(stats, torch.ones(2), torch.tensor([1.0, 0.0]), torch.zeros(2), settings)
        share = w.micro_batch_loss(stats, w.window_of(columns, settings), slice(0, 2), settings)
        assert share.coefficients.isfinite().all()
        assert share.value.isfinite()


def zero(stage: int) -> dict[str, Any]:
    plugin = SimpleNamespace(zero_stage=stage)
    return {
        "is_deepspeed_enabled": True,
        "accelerator": SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (zero(3), "ZeRO-3 is not supported.*ZeRO-2, or FSDP2"),
        (zero(2) | {"args": SimpleNamespace(score_norm="exact")}, "'exact' does not work with DeepSpeed's ZeRO.*FSDP2"),
        ({"is_fsdp_enabled": True}, "FSDP is not supported.*DistributedDataParallel"),
        ({"_is_vlm": True}, "vision-language models are not supported"),
    ],
)
def test_a_launcher_or_model_that_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """A launcher's plugin is in no option: it shows on the trainer alone."""
    trainer = SimpleNamespace(
        is_deepspeed_enabled=False, is_fsdp_enabled=False, _is_vlm=False, args=SimpleNamespace(score_norm="logit")
    )
    check_support(trainer)
    trainer.__dict__.update(changes)
    with pytest.raises(ValueError, match=message):
        check_support(trainer)


def test_a_model_that_ranks_share_is_refused_by_name(tmp_path: Any) -> None:
    """tp_plan's parameters are DTensors and no FSDP2 unit's; before transformers' Trainer takes the ranks for data ranks."""
    model = setup.model()
    weight: Any = model.get_parameter("lm_head.weight")
    weight.full_tensor = weight.detach
    for where in (lambda: check_whole("VCPOTrainer", model), lambda: setup.trainer(tmp_path, base=model)):
        with pytest.raises(
            ValueError, match=r"VCPOTrainer: lm_head has parameters that are split over ranks.*docs/parallel"
        ):
            where()
    check_whole("VCPOTrainer", "a name")


def test_reduced_precision_keeps_the_gradients_direction(tmp_path: Any) -> None:
    """bf16 by autocast, as Accelerate wraps a model's forward for it; and autocast is off again afterwards."""
    gradients = []
    for bf16 in (False, True):
        trainer = setup.trainer(tmp_path, max_steps=1, bf16=bf16)
        trainer.train()
        gradients.append(torch.cat([g.flatten().double() for g in trainer.recorder.gradients[0].values()]))
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.98
    assert not torch.equal(*gradients)
    assert not torch.is_autocast_enabled("cpu")
