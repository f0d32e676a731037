"""The plain DDP loop of docs/ddp.md: what it does in a step, and that two ranks do the same as one process."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

import vcpo_kernels as vk

pytest.importorskip("transformers", reason="the loop's model is Hugging Face's: pip install transformers")
from examples.loops import ddp_loop, launch, rollouts


def test_steps_are_those_of_the_whole_batch_at_the_scaled_rate() -> None:
    """Against one vcpo_loss on the whole step, and AdamW whose rate is set by hand to lr sqrt(ESS / B)."""
    model, history = ddp_loop.train()
    reference = rollouts.tiny_model()
    optimizer = torch.optim.AdamW(reference.parameters())
    data = rollouts.StalePrompts(ddp_loop.STEPS * ddp_loop.PROMPTS_PER_STEP)
    for step, seen in enumerate(history):
        prompts = [data[i] for i in range(step * ddp_loop.PROMPTS_PER_STEP, (step + 1) * ddp_loop.PROMPTS_PER_STEP)]
        batch = rollouts.collate(prompts)
        stats = vk.token_stats(reference(batch["ids"]).logits, batch["ids"], batch["mask"], shift=True)
        segments = vk.Segments.padded(batch["mask"])
        out = vk.vcpo_loss(stats, batch["behavior_logp"], batch["rewards"], rollouts.SAMPLES, segments)
        assert seen["ess_ratio"] == pytest.approx(out.ess_ratio.item(), rel=1e-4)
        assert seen["loss"] == pytest.approx(out.loss.item(), rel=1e-3, abs=1e-6)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * out.ess_ratio.sqrt().item()
        optimizer.step()
        optimizer.zero_grad()
    assert min(seen["ess_ratio"] for seen in history) < 0.9, "the rate is scaled, or this shows nothing"
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)


def test_two_ranks_are_one_process() -> None:
    pytest.importorskip("accelerate", reason="the two ranks run Accelerate's loop too: pip install accelerate")
    from tests.integrations import two_ranks

    model, history = ddp_loop.train()
    two_ranks.same("ddp", model, [step["ess_ratio"] for step in history])


def test_ranks_leave_no_thread_of_gloo() -> None:
    """After every loop and `leave`, which joins them: one that is left may abort the process when it ends."""
    pytest.importorskip("accelerate", reason="the two ranks run Accelerate's loop too: pip install accelerate")
    from tests.integrations import two_ranks

    for rank in two_ranks.results():
        assert not [name for name in rank["threads"] if "gloo" in name]


def test_more_processes_than_micro_batches_are_refused() -> None:
    """A share that does not come out even would change k_i in silence."""
    with pytest.raises(ValueError, match="4 micro-batches of a step cannot be divided among 3 processes"):
        launch.share(4, 3)


def test_uneven_micro_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """num_sequences makes k_i the step's, however it is cut: 3 + 3 + 2 prompts as well as 2 + 2 + 2 + 2."""
    model, history = ddp_loop.train()
    monkeypatch.setattr(ddp_loop, "MICRO_BATCH", 3)
    other, other_history = ddp_loop.train()
    for a, b in zip(history, other_history, strict=True):
        assert a["ess_ratio"] == pytest.approx(b["ess_ratio"], rel=1e-4)
    for got, want in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)


def test_page_shows_the_code_that_runs() -> None:
    """docs/ddp.md's snippets are lines of the example, and its snippets of their own run."""
    text = Path("docs/ddp.md").read_text()
    source = Path("examples/loops/ddp_loop.py").read_text()
    shown, token_mean = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for line in shown.splitlines():
        assert line.strip() in source, line
    data = rollouts.StalePrompts(4)
    model = rollouts.tiny_model()
    whole = copy.deepcopy(model)
    names = {"vk": vk, "model": model, "micro_batches": [rollouts.collate([data[i], data[i + 1]]) for i in (0, 2)]}
    exec(token_mean, {**names, "ranks": 1, "all_reduced": lambda x: x, "SAMPLES": rollouts.SAMPLES})
    batch = rollouts.collate([data[i] for i in range(4)])
    stats = vk.token_stats(whole(batch["ids"]).logits, batch["ids"], batch["mask"], shift=True)
    segments, config = vk.Segments.padded(batch["mask"]), vk.VCPOConfig(aggregation="token-mean")
    vk.vcpo_loss(stats, batch["behavior_logp"], batch["rewards"], rollouts.SAMPLES, segments, config).loss.backward()
    for got, want in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5)
