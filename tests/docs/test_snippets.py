"""Python of the pages accelerate.md, ddp.md, huggingface.md and verl.md as printed, with what the page says is around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import vcpo_kernels as vk
from tests.docs.pages import snippets
from vcpo_kernels.integrations import verl

pytest.importorskip("transformers", reason="the loops' model is Hugging Face's: pip install transformers")
pytest.importorskip("accelerate", reason="pip install accelerate")
import accelerate
from accelerate.state import AcceleratorState

from examples.loops import accelerate_loop, ddp_loop, hugging_face_trainer, rollouts


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_ddp_step() -> None:
    """docs/ddp.md: the step is the example's first."""
    step, _ = snippets("docs/ddp.md")
    data = rollouts.StalePrompts(ddp_loop.STEPS * ddp_loop.PROMPTS_PER_STEP)
    size = ddp_loop.MICRO_BATCH
    batches = [
        rollouts.collate([data[j] for j in range(i, i + size)]) for i in range(0, ddp_loop.PROMPTS_PER_STEP, size)
    ]
    model = rollouts.tiny_model()
    names: dict[str, Any] = {
        "vk": vk, "dist": dist, "ranks": 1, "rollouts": rollouts, "model": model, "micro_batches": batches,
        "PROMPTS_PER_STEP": ddp_loop.PROMPTS_PER_STEP, "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-3),
    }  # fmt: skip
    exec(step, names)
    assert names["ess_rate"].ratio.item() == pytest.approx(ddp_loop.train()[1][0]["ess_ratio"], rel=1e-5)


def test_accelerate_loop() -> None:
    """docs/accelerate.md: as many steps as the example, whose first has the same ESS."""
    (loop,) = snippets("docs/accelerate.md")
    size = accelerate_loop.MICRO_BATCH
    steps_of = accelerate_loop.PROMPTS_PER_STEP // size
    for count in (1, accelerate_loop.STEPS):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps_of)
        prompts = rollouts.StalePrompts(accelerate_loop.STEPS * accelerate_loop.PROMPTS_PER_STEP)
        subset = torch.utils.data.Subset(prompts, range(count * accelerate_loop.PROMPTS_PER_STEP))
        names: dict[str, Any] = {
            "torch": torch, "vk": vk, "dist": dist, "rollouts": rollouts, "MICRO_BATCH": size, "accelerator": accelerator,
            "model": rollouts.tiny_model(),
            "data": torch.utils.data.DataLoader(subset, size, collate_fn=rollouts.collate, drop_last=True),
        }  # fmt: skip
        exec(loop, names)
        if count == 1:
            first = names["ess_rate"].ratio.item()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert first == pytest.approx(accelerate_loop.train(cpu=True)[1][0], rel=1e-5)
    assert 0 < names["ess_rate"].ratio.item() < 1


def test_hugging_face_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/huggingface.md: the class trains as the example's does."""
    (shown,) = snippets("docs/huggingface.md")

    def last_ratio(folder: str) -> float:
        trainer = hugging_face_trainer.make_trainer(str(tmp_path / folder))
        trainer.train()
        return float(trainer.ess_rate.ratio)

    want = last_ratio("example")
    names = dict(vars(hugging_face_trainer))
    exec(shown, names)
    monkeypatch.setattr(hugging_face_trainer, "RolloutTrainer", names["RolloutTrainer"])
    assert last_ratio("page") == pytest.approx(want, rel=1e-5)


def test_verl_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/verl.md: registered by the name that it says; verl's registry is stood in for where verl is not installed."""
    own, _ = snippets("docs/verl.md")
    registry: dict[str, Any] = {}
    monkeypatch.setattr(
        verl,
        "_core_algos",
        lambda: SimpleNamespace(register_policy_loss=lambda name: lambda f: registry.update({name: f})),
    )
    exec(own, {})
    assert registry["vcpo_untruncated"].__name__ == "vcpo_untruncated"


def test_verl_hands_over_log_probs() -> None:
    """docs/verl.md's second snippet, where verl is installed (`make test-verl`)."""
    pytest.importorskip("verl", reason="verl is not installed: make test-verl")
    _, hand_over = snippets("docs/verl.md")
    exec(hand_over, {})
