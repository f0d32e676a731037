"""The Hugging Face Trainer of docs/huggingface.md: its steps, logs, skipped steps, evaluation, and two processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vcpo_kernels as vk

pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("accelerate", reason="the Trainer needs it: pip install accelerate")
from accelerate.state import AcceleratorState

from examples.loops import hugging_face_trainer as example
from examples.loops import rollouts


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def logged(trainer: Any, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def test_steps_are_those_of_the_whole_window_at_the_scaled_rate(tmp_path: Path) -> None:
    """Each window's gradient against one vcpo_loss on all its prompts; the rate used is lr sqrt(ESS / B), and is logged."""
    trainer = example.make_trainer(str(tmp_path), max_grad_norm=0.0)
    windows: list[list[rollouts.Batch]] = [[]]
    loss_of, reference = trainer.compute_loss, rollouts.tiny_model()
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.0)

    def recording(model: Any, inputs: Any, **kwargs: Any) -> Any:
        windows[-1].append(inputs)
        if len(windows[-1]) == 4:
            windows.append([])
        return loss_of(model, inputs, **kwargs)

    trainer.compute_loss = recording  # type: ignore[method-assign]
    trainer.train()
    assert [len(w) for w in windows] == [4, 4, 4, 4, 0]
    for window, ratio, used in zip(
        windows, logged(trainer, "vcpo/ess_ratio"), logged(trainer, "vcpo/learning_rate_used"), strict=False
    ):
        batch = {name: torch.cat([b[name] for b in window]) for name in window[0]}
        stats = vk.token_stats(reference(batch["ids"]).logits, batch["ids"], batch["mask"], shift=True)
        segments = vk.Segments.padded(batch["mask"])
        out = vk.vcpo_loss(stats, batch["behavior_logp"], batch["rewards"], rollouts.SAMPLES, segments)
        assert ratio == pytest.approx(out.ess_ratio.item(), rel=1e-4)
        assert used == pytest.approx(3e-3 * out.ess_ratio.sqrt().item(), rel=1e-4)
        out.loss.backward()
        optimizer.param_groups[0]["lr"] = used
        optimizer.step()
        optimizer.zero_grad()
    assert logged(trainer, "learning_rate") == [3e-3] * 4, "the scheduler's own rate is untouched"
    for got, want in zip(trainer.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)


def test_two_processes_are_one(tmp_path: Path) -> None:
    from tests.integrations import two_ranks

    trainer = example.make_trainer(str(tmp_path))
    trainer.train()
    two_ranks.same("trainer", trainer.model, logged(trainer, "vcpo/ess_ratio"))


def test_skipped_step_leaves_nothing(tmp_path: Path) -> None:
    """After an fp16 overflow the Trainer clears gradients past the optimizer; the next ESS is the next window's alone."""
    trainer = example.make_trainer(str(tmp_path), max_steps=2)
    create = trainer.create_optimizer
    skipped: list[bool] = []

    def create_and_skip_once(model: Any = None) -> torch.optim.Optimizer:
        fresh, optimizer = trainer.optimizer is None, create(model)
        step = optimizer.step

        def once(*args: Any, **kwargs: Any) -> Any:
            skipped.append(not skipped)
            return None if skipped[-1] else step(*args, **kwargs)

        if fresh:
            optimizer.step = once  # type: ignore[method-assign]
        return optimizer

    trainer.create_optimizer = create_and_skip_once  # type: ignore[method-assign]
    observed: list[vk.VCPOOutput] = []
    trainer.create_optimizer()
    observe = trainer.ess_rate.observe
    trainer.ess_rate.observe = lambda out: (observed.append(out), observe(out))[1]  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    assert skipped == [True, False]
    second = torch.cat([out.log_weights for out in observed[4:]])
    assert trainer.ess_rate.ratio is not None
    assert trainer.ess_rate.ratio.item() == pytest.approx(vk.effective_sample_size(second).ratio.item(), rel=1e-5)


def test_evaluation_is_no_part_of_a_step(tmp_path: Path) -> None:
    trainer = example.make_trainer(str(tmp_path))
    trainer.create_optimizer()
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, rollouts.collate([trainer.train_dataset[0]]))
    assert loss.isfinite()
    assert not trainer.ess_rate._window


@pytest.mark.parametrize(
    ("page", "example_file"), [("huggingface", "hugging_face_trainer"), ("accelerate", "accelerate_loop")]
)
def test_pages_show_the_code_that_runs(page: str, example_file: str) -> None:
    source = Path(f"examples/loops/{example_file}.py").read_text()
    snippets = re.findall(r"```python\n(.*?)```", Path(f"docs/{page}.md").read_text(), re.DOTALL)
    assert snippets
    for line in "".join(snippets).splitlines():
        assert line.strip() in source, line
