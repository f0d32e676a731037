"""VCPOTrainer under DeepSpeed's ZeRO-1 and 2 on two ranks ends with the parameters of one process; what cannot is refused."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks
from tests.integrations import trl_setup as setup
from tests.integrations.test_trl_ranks import LOGGED, OfRank

TWO_ROUNDS: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
# (stage, changes) of two processes; one takes twice the sequences at a time. Transformers makes two groups of parameters.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "no ZeRO, exact norms": (0, TWO_ROUNDS | {"score_norm": "exact"}),
    "ZeRO-1": (1, TWO_ROUNDS),
    "ZeRO-1, a group over two ranks": (1, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}),
    "ZeRO-2, clipped": (2, TWO_ROUNDS | {"max_grad_norm": 0.5}),
    "ZeRO-2, KL, entropy": (2, TWO_ROUNDS | {"beta": 0.2, "entropy_coef": 0.1, "gradient_checkpointing": True}),
}
REFUSED = {"ZeRO-3": (3, TWO_ROUNDS), "exact": (2, TWO_ROUNDS | {"score_norm": "exact"})}


def train(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    trainer = setup.VCPOTrainer(
        str(folder / "model"), setup.reward, setup.arguments(folder / "out", **changes), setup.dataset(),
        processing_class=setup.tokenizer(), rollout_func=OfRank(),
    )  # fmt: skip
    trainer.train()
    return {
        "optimizer": type(trainer.optimizer).__name__,
        "parameters": {n: p.detach().clone() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()},
        "logged": [{k: e[k] for k in LOGGED if k in e} for e in trainer.state.log_history if "loss" in e],
    }  # fmt: skip


def zero(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def on_rank(rank: int, folder: Path) -> dict[str, Any]:
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", DEEPSPEED_LOG_LEVEL="error")
    found: dict[str, Any] = {}
    for name, (stage, changes) in (CASES | REFUSED).items():
        try:
            found[name] = train(folder, {**changes, "deepspeed": zero(stage)})
        except ValueError as error:
            if name in CASES:
                raise
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deepspeed")
    setup.model().save_pretrained(made / "model")
    return made


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict[str, Any]]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    return ranks.run(on_rank, 2, folder, group=False)  # DeepSpeed makes it


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_as_one_process(of_two: list[dict[str, Any]], folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model").symlink_to(folder / "model")
    changes = CASES[name][1]
    want = train(tmp_path, {**changes, "per_device_train_batch_size": 2 * changes["per_device_train_batch_size"]})
    assert want["logged"][-1]["vcpo/ess_ratio"] < 0.99
    for result in (of_rank[name] for of_rank in of_two):
        assert result["optimizer"] == "DeepSpeedOptimizerWrapper"
        for logged, expected in zip(result["logged"], want["logged"], strict=True):
            assert logged == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for parameter, expected in want["parameters"].items():
            torch.testing.assert_close(result["parameters"][parameter], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_right_is_refused_by_name(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        assert "ZeRO-3 is not supported" in result["ZeRO-3"]
        assert "'exact' does not work with DeepSpeed's ZeRO" in result["exact"]
