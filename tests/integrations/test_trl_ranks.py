"""Two processes (gloo) train as one does on the same data: same ESS, same parameters, and the same on both ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks
from tests.integrations import trl_async_setup
from tests.integrations import trl_setup as setup

# Of two processes; one process takes twice the sequences at a time.
CASES: dict[str, dict[str, Any]] = {
    "logit": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "exact, KL, entropy": {
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "score_norm": "exact", "beta": 0.2,
        "entropy_coef": 0.1, "activation_checkpointing": True,
    },
    "stale halves": {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4},
    "a group over two ranks": {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2},
    "own samples": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}  # fmt: skip
LOGGED = (
    "vcpo/ess_ratio",
    "vcpo/rate_scale",
    "vcpo/baseline_mean",
    "vcpo/num_tokens",
    "learning_rate",
    "loss",
    "entropy",
)


class OfRank(setup.Rollouts):
    """Where a group lies on two ranks, the second one's samples are numbered on."""

    def sequence(self, prompt: str, number: int) -> setup.Sequence:
        return super().sequence(prompt, number + self.first)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        straddling = trainer.args.per_device_train_batch_size < setup.GROUP
        self.first = len(prompts) * trainer.accelerator.process_index if straddling else 0
        return super().__call__(prompts, trainer)


def train(folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    rollouts = None if name == "own samples" else OfRank()
    trainer = setup.VCPOTrainer(
        str(folder / "model"), setup.reward, setup.arguments(folder / "out", **changes), setup.dataset(),
        processing_class=setup.tokenizer(), rollout_func=rollouts,
    )  # fmt: skip
    trainer.train()
    return results(trainer)


def train_async(folder: Path, processes: int) -> Any:
    return trl_async_setup.train(folder, trl_async_setup.sequences(), processes)


def results(trainer: Any) -> dict[str, Any]:
    entries = [e for e in trainer.state.log_history if "loss" in e]
    return {
        "parameters": {
            n: p.detach().clone() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        },
        "logged": [{k: e[k] for k in LOGGED if k in e} for e in entries],
    }


def on_rank(rank: int, folder: Path) -> None:
    for name, changes in CASES.items():
        torch.save(train(folder, name, changes), folder / f"{name}.{rank}.pt")
    torch.save(results(train_async(folder, processes=2)), folder / f"async.{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks' results of every case are; one pair of processes for all of them."""
    made = tmp_path_factory.mktemp("ranks")
    setup.model().save_pretrained(made / "model")
    ranks.run(on_rank, 2, made, group=False)  # accelerate makes it
    return made


@pytest.mark.parametrize("name", [*CASES, "async"])
def test_both_ranks_end_with_the_same_parameters(folder: Path, name: str) -> None:
    first, second = (torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1))
    for parameter, want in first["parameters"].items():
        assert torch.equal(second["parameters"][parameter], want), parameter
    start = setup.transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    assert not torch.equal(first["parameters"]["lm_head.weight"], start.lm_head.weight)  # it trained at all


# Not where ranks draw from seeds of their own, nor where a window holds other groups on two ranks than on one.
@pytest.mark.parametrize("name", ["logit", "exact, KL, entropy", "a group over two ranks", "async"])
def test_one_process_does_the_same_as_two(folder: Path, tmp_path: Path, name: str) -> None:
    together = torch.load(folder / f"{name}.0.pt")
    (tmp_path / "model").symlink_to(folder / "model")
    if name == "async":
        alone = results(train_async(tmp_path, processes=1))
    else:
        twice = 2 * CASES[name]["per_device_train_batch_size"]
        alone = train(tmp_path, name, {**CASES[name], "per_device_train_batch_size": twice})
    for want, got in zip(alone["logged"], together["logged"], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert alone["logged"][-1]["vcpo/ess_ratio"] < 0.99
    for parameter, want in alone["parameters"].items():
        torch.testing.assert_close(together["parameters"][parameter], want, rtol=1e-4, atol=1e-5)
