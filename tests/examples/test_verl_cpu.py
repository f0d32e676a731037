"""A whole run of verl: its `main_ppo`, Ray, two FSDP2 actors, `RayPPOTrainer.fit`, with the settings of docs/verl.md.

`make test-verl` runs it, in verl's own environment; what needs no verl runs everywhere.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import pytest

from tests.docs import pages

pytest.importorskip("transformers", reason="the run's model is Hugging Face's: pip install transformers")
from examples.loops import rollouts
from examples.verl_cpu import __main__ as run


def test_the_settings_are_the_pages() -> None:
    """docs/verl.md's decoupled block, line by line."""
    blocks = [block.text for block in pages.blocks("docs/verl.md") if "loss_mode=vcpo_decoupled" in block.text]
    shown = dict(line.split("=") for line in blocks[0].splitlines())
    assert {key: str(value) for key, value in run.VCPO.items()} == shown


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed: make test-verl")
def test_three_steps(tmp_path: Path) -> None:
    """The actors' rate follows the ESS of all samples of both, by verl's own mean and deviation of their weights."""
    steps = run.train(tmp_path, 3, timeout=400)
    assert len(steps) == 3
    count = run.PROMPTS_PER_STEP * rollouts.SAMPLES
    for step, after in itertools.pairwise(steps):  # a step's ESS is logged by the next
        mean, deviation = (step[f"rollout_corr/rollout_is_seq_{name}"] for name in ("mean", "std"))
        ess_ratio = mean**2 / (mean**2 + deviation**2 * (count - 1) / count)
        assert after["actor/vcpo_last_step_ess_ratio"] == pytest.approx(ess_ratio, rel=1e-4)
        assert after["actor/vcpo_last_step_lr_scale"] == pytest.approx(math.sqrt(ess_ratio), rel=1e-4)
        assert after["actor/lr"] == float(run.RUN["actor_rollout_ref.actor.optim.lr"])  # put back after each step
    assert steps[2]["actor/vcpo_last_step_ess_ratio"] < 0.95
    assert steps[0]["actor/grad_norm"] > 0
    assert steps[0]["actor/vcpo_num_sequences"] == run.RUN["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"]
