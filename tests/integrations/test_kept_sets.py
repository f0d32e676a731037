"""A sampler's kept set that no option shows: the trainers that log their tokens' log-ratios say so, on whatever device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vcpo_kernels.core import checks
from vcpo_kernels.integrations import verl
from vcpo_kernels.sequences import behavior

MESSAGE = r"log pi < log mu at 100% of the tokens, by .* nats a token: .*top-p, top-k, min-p"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was said yet, and no tensor may be read."""
    monkeypatch.setattr(behavior, "_said", set())
    monkeypatch.setattr(checks, "readable", lambda tensor: False)


def test_trl(tmp_path: Path) -> None:
    """Every recorded log mu is a twentieth of a nat above what the policy gave its token."""
    pytest.importorskip("trl", reason="pip install 'trl>=1.16,<1.17'")
    from tests.integrations import trl_setup

    class Restricted(trl_setup.Rollouts):
        def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
            made = super().__call__(prompts, trainer)
            made["completion_ids"] = [ids * 4 for ids in made["completion_ids"]]  # enough tokens to tell
            made["logprobs"] = [
                logp_of(trainer, p, c) for p, c in zip(made["prompt_ids"], made["completion_ids"], strict=True)
            ]
            return made

    @torch.no_grad()
    def logp_of(trainer: Any, prompt: list[int], completion: list[int]) -> list[float]:
        logits = (
            trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / trainer.temperature
        )
        logp = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        return (logp + 0.05).tolist()

    with pytest.warns(UserWarning, match="VCPOTrainer: " + MESSAGE):
        trl_setup.trainer(tmp_path, Restricted(), max_steps=1).train()


def test_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    agg_loss = SimpleNamespace(agg_loss=lambda loss_mat, **rest: loss_mat.sum())
    monkeypatch.setattr(verl, "_core_algos", lambda: agg_loss)
    mask, config = torch.ones(4, 30), SimpleNamespace(global_batch_info={})
    logp = torch.full((4, 30), -1.0, requires_grad=True)
    with pytest.warns(UserWarning, match=r"vcpo \(verl\): " + MESSAGE):
        verl.policy_loss(logp.detach() + 0.05, logp, mask, mask, "token-mean", config, None, verl.PolicyLossOptions())
