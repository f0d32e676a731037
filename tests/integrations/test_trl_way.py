"""One pass over a micro-batch gives the two passes' gradients, ESS and log; and it is taken where it can be."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integrations import trl_setup as setup
from vcpo_kernels.integrations.trl import trainer as trainer_module
from vcpo_kernels.integrations.trl.way import Way, way_of

TWO_PASSES = Way(False, False, "for comparison")


def settings(
    rows: int = 8, rounds: int = 2, processes: int = 1, score_norm: str = "logit", **changes: Any
) -> SimpleNamespace:
    args = SimpleNamespace(per_device_train_batch_size=rows, steps_per_generation=rounds, score_norm=score_norm)
    trainer = {
        "args": args, "accelerator": SimpleNamespace(num_processes=processes, scaler=None), "num_generations": 4,
        "beta": 0.0, "entropy_coef": 0.0, "aux_loss_enabled": False, "is_deepspeed_enabled": False,
    }  # fmt: skip
    return SimpleNamespace(**trainer | changes)


@pytest.mark.parametrize(
    ("found", "one_pass", "across", "why"),
    [
        (settings(rows=4), True, False, "micro-batches of 4 hold whole groups of 4"),
        (settings(rows=8, processes=2), True, False, "micro-batches of 8 hold whole groups of 4"),
        (settings(rows=2, rounds=1, processes=2), True, True, "the micro-batches of 2 processes together"),
        (settings(rows=2, rounds=2, processes=2), False, False, "split over micro-batches of 2.*multiple of 4"),
        (settings(rows=6), False, False, "split over micro-batches of 6"),
        (settings(score_norm="exact"), True, False, "whole groups"),
        (settings(score_norm="exact", beta=0.1), False, False, "exact.*a KL penalty"),
        (settings(score_norm="exact", entropy_coef=0.1), False, False, "exact.*an entropy bonus"),
        (settings(score_norm="exact", aux_loss_enabled=True), False, False, "exact.*a router loss"),
        (settings(score_norm="exact", is_deepspeed_enabled=True), False, False, "exact.*DeepSpeed's engine"),
    ],
)
def test_which_way(found: SimpleNamespace, one_pass: bool, across: bool, why: str) -> None:
    way = way_of(found)
    assert (way.one_pass, way.across) == (one_pass, across)
    assert re.search(why, way.why)


def train(folder: Path, **changes: Any) -> tuple[Any, int, list[setup.Sequence]]:
    """The trainer after its steps, and how often it called its model in them."""
    rollouts = setup.Rollouts()
    setup.model().save_pretrained(folder / "model")  # a reference model is read again
    trainer = setup.trainer(folder, rollouts, str(folder / "model"), **changes)
    calls, before = 0, trainer.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return before(*args, **kwargs)

    trainer.model.__dict__["forward"] = counted
    trainer.train()
    return trainer, calls, [s for call in rollouts.calls for s in call]


CASES: dict[str, dict[str, Any]] = {
    "logit": {},
    "exact": {"score_norm": "exact"},
    "KL, entropy": {"beta": 0.2, "entropy_coef": 0.1},
    "sequence means": {"loss_type": "grpo", "num_iterations": 2, "max_steps": 4},
    "a part of a generation": {"steps_per_generation": 4, "max_steps": 4},
    "masked": {"mask_truncated_completions": True, "loss_type": "dr_grpo"},
    "checkpoints": {"score_norm": "exact", "activation_checkpointing": True},
}


@pytest.mark.parametrize("name", CASES)
def test_one_pass_is_the_two_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes = CASES[name]
    one, calls, sequences = train(tmp_path / "one", **changes)
    assert one._way.one_pass
    monkeypatch.setattr(trainer_module, "way_of", lambda trainer: TWO_PASSES)
    two, twice, _ = train(tmp_path / "two", **changes)
    steps = one.state.global_step
    assert twice - calls == 2 * steps  # two micro-batches a step
    assert len(sequences) >= 16
    for step, (gradients, wanted) in enumerate(zip(one.recorder.gradients, two.recorder.gradients, strict=True)):
        for parameter, want in wanted.items():
            error = (gradients[parameter] - want).norm() / want.norm().clamp(min=1e-12)
            # From the second step on, at parameters that rounding has moved apart.
            assert error < (5e-6 if step == 0 else 1e-4), parameter
    logged, wanted_log = ([e for e in t.state.log_history if "loss" in e] for t in (one, two))
    timed = {"step_time", "epoch"}
    for entry, want in zip(logged, wanted_log, strict=True):
        assert entry.keys() == want.keys()
        shown = {k: v for k, v in want.items() if k not in timed and isinstance(v, float)}
        assert {k: entry[k] for k in shown} == pytest.approx(shown, rel=2e-4, abs=1e-5)
    assert logged[-1]["vcpo/ess_ratio"] < 0.99


def test_it_says_once_what_a_setting_would_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    transformers.utils.logging.enable_propagation()
    try:
        setup.trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    finally:
        transformers.utils.logging.disable_propagation()
    found = [r.message for r in caplog.records if "two passes" in r.message]
    assert len(found) == 1
    assert "per_device_train_batch_size as a multiple of 4 would save a forward pass" in found[0]
