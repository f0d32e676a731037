"""Against Liger's Triton GRPO kernel, run by Triton's interpreter in a process of its own (the switch has to be set before the
first import of Triton).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vcpo_kernels as vk
from vcpo_kernels.objectives import OBJECTIVES, Correction

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="Liger is not installed (`pip install liger-kernel`)"
)

# Liger's settings, and the entry of OBJECTIVES with its knobs. "is_ratio": a factor by token, as vLLM's correction.
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"loss_type": "grpo"}, "grpo", {"clip_high": 0.4}),
    ({"loss_type": "grpo", "beta": 0.2}, "grpo", {"clip_high": 0.4, "kl_coefficient": 0.2}),
    (
        {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": True},
        "dapo",
        {"clip_high": 0.4, "kl_coefficient": 0.2, "kl_importance_weighted": True},
    ),
    ({"loss_type": "bnpo", "delta": 1.6}, "bnpo", {"clip_high": 0.4, "dual_clip": 1.6}),
    ({"loss_type": "dr_grpo", "max_completion_length": 9}, "dr_grpo", {"clip_high": 0.4, "max_tokens": 9.0}),
    ({"loss_type": "cispo", "eps_high": 1.3}, "cispo", {"max_ratio": 1.3}),
    ({"loss_type": "sapo"}, "sapo", {}),
    ({"loss_type": "vespo"}, "vespo", {}),
    (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "eps_low": 0.05, "eps_high": 0.05},
        "gspo",
        {"clip_low": 0.05, "clip_high": 0.05},
    ),
    ({"loss_type": "grpo", "is_ratio": True}, "grpo", {"clip_high": 0.4, "correction": Correction(maximum=1.2)}),
]

PROGRAM = """
import sys, torch
from liger_kernel.transformers.grpo_loss import triton_grpo_loss
data, cases = torch.load(sys.argv[1], weights_only=True)
results = []
for settings in cases:
    is_ratio = data["is_ratio"] if settings.pop("is_ratio", False) else None
    logits = data["logits"].clone().requires_grad_()
    loss, metrics = triton_grpo_loss(
        logits, data["old_logp"], data["reference"], data["ids"], data["advantages"], data["mask"],
        **{"temperature": 1.0, "beta": 0.0, "inplace": False, "reduce": True, "vllm_is_ratio": is_ratio} | settings)
    loss.backward()
    results.append((loss.detach(), logits.grad))
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 3, 4]
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).float()
    logits = torch.randn(4, 6, 11, generator=generator)
    ids = torch.randint(0, 11, (4, 5), generator=generator)
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[..., None])[..., 0]
    old, reference, sampler = (logp - 0.4 * torch.randn(4, 5, generator=generator) for _ in range(3))
    advantages = torch.tensor([1.0, -0.5, -2.0, 0.75])
    is_ratio = (old - sampler).exp().clamp(max=1.2)
    return {
        "logits": logits, "ids": ids, "mask": mask, "old_logp": old, "reference": reference, "sampler": sampler,
        "advantages": advantages, "is_ratio": is_ratio,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ligers(
    data: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient of every case, from one process."""
    folder = tmp_path_factory.mktemp("liger")
    torch.save((data, [dict(settings) for settings, _, _ in CASES]), folder / "in.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(folder / "in.pt"), str(folder / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    results: list[tuple[torch.Tensor, torch.Tensor]] = torch.load(folder / "out.pt", weights_only=True)
    return results


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][0].values())))
def test_is_ligers_loss(
    case: int, data: dict[str, torch.Tensor], ligers: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    _, name, knobs = CASES[case]
    logits = data["logits"].clone().requires_grad_()
    stats = vk.token_stats(logits[:, :-1], data["ids"])
    behavior = data["old_logp"]
    knobs = dict(knobs)
    if "correction" in knobs:
        knobs["proximal_logp"], behavior = behavior, data["sampler"]
    if "kl_coefficient" in knobs:
        knobs["reference_logp"] = data["reference"]
    out = OBJECTIVES[name](stats, behavior, data["advantages"], vk.Segments.padded(data["mask"]), **knobs)
    out.loss.backward()
    loss, gradient = ligers[case]
    torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-4, atol=1e-6)
