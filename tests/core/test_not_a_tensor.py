"""What is no tensor is refused with the fix for what it is: an array, a list, a model's output, a batch, None."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import vcpo_kernels as vk
from vcpo_kernels.core import checks
from vcpo_kernels.core.checks import Check

ROWS = torch.zeros(4, 3, 7)
IDS = torch.zeros(4, 3, dtype=torch.long)


class ModelOutput(OrderedDict[str, Any]):
    """transformers' in small: a mapping and a dataclass at once."""


@dataclass
class CausalLMOutput(ModelOutput):
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: Any = None


class Rollout(NamedTuple):
    logits: torch.Tensor
    length: int


class FromElsewhere:
    """An array of neither numpy nor torch."""

    dtype, shape = "float32", (2,)

    def __array__(self) -> Any: ...


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", None, r"got None \(NoneType\). Fix: give logits a tensor.$"),
        ("logits", np.zeros((2, 3), np.float32), r"got a float32 ndarray of shape \(2, 3\) \(numpy\). Fix: torch.from_numpy\("),
        ("logits", np.float32(1.0), r"Fix: torch.from_numpy\(logits\)"),
        ("logits", FromElsewhere(), r"Fix: torch.as_tensor\(logits\).$"),
        ("config.score_norm", [[1.0], [2.0]], r"\(list\). Fix: torch.as_tensor\(config.score_norm\).$"),
        ("the rule's", [1.0, 2.0], r"got \[1.0, 2.0\] \(list\). Fix: torch.as_tensor\(...\).$"),
        ("rewards", 1.0, r"got 1.0 \(float\). Fix: torch.as_tensor\(rewards\).$"),
        ("logits", [ROWS, ROWS], r"got a list of 2 tensors. Fix: torch.stack\(logits\), or .*pad_sequence"),
        ("logits", (ROWS,), r"got a tuple of 1 tensors. Fix: torch.stack"),
        ("logits", CausalLMOutput(ROWS), r"got CausalLMOutput with logits. Fix: pass its tensor, logits.logits.$"),
        ("hidden", CausalLMOutput(ROWS, ROWS), r"logits, last_hidden_state. Fix: pass its tensor, hidden.last_hidden_state.$"),
        ("weight", CausalLMOutput(ROWS), r"Fix: pass the tensor that is meant of its logits.$"),
        ("logits", Rollout(ROWS, 3), r"got Rollout with logits. Fix: pass its tensor, logits.logits.$"),
        ("token_ids", {"input_ids": IDS, "n": 1}, r"got dict with input_ids. Fix: pass its tensor, token_ids\['input_ids'\].$"),
        ("mask", {"attention_mask": IDS}, r"Fix: pass its tensor, mask\['attention_mask'\].$"),
        ("logits", "x", r"got 'x' \(str\).$"),
    ],
)  # fmt: skip
def test_fix(name: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^f: {name} must be a torch.Tensor, (?s:.*){message}"):
        Check("f").tensor(name, value)


def test_the_callers_fix_is_for_the_rest() -> None:
    """What the caller says of dtypes is no help where there is no tensor at all."""
    with pytest.raises(TypeError, match=r"Fix: torch.from_numpy\(ids\).$"):
        Check("f").tensor("ids", np.zeros(2), checks.ID_DTYPES, "Convert it: ids.long().")
    with pytest.raises(TypeError, match=r"Convert it: ids.long\(\).$"):
        Check("f").tensor("ids", torch.zeros(2), checks.ID_DTYPES, "Convert it: ids.long().")


SEGMENTS = vk.Segments.padded(torch.ones(4, 3))
STATS = vk.token_stats(ROWS, IDS)
WEIGHT, HIDDEN, TOKENS, SEQUENCES = torch.zeros(7, 5), torch.zeros(4, 3, 5), torch.zeros(4, 3), torch.ones(4)
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "token_stats": (vk.token_stats, {"logits": ROWS, "token_ids": IDS, "mask": TOKENS}),
    "linear_token_stats": (vk.linear_token_stats, {"hidden": HIDDEN, "weight": WEIGHT, "token_ids": IDS, "mask": TOKENS}),
    "weighted_logp": (vk.weighted_logp, {"logits": ROWS, "token_ids": IDS, "coefficients": TOKENS, "mask": TOKENS}),
    "linear_weighted_logp": (
        vk.linear_weighted_logp, {"hidden": HIDDEN, "weight": WEIGHT, "token_ids": IDS, "coefficients": TOKENS}),
    "vcpo_loss": (
        vk.vcpo_loss, {"stats": STATS, "behavior_logp": STATS.logp, "rewards": SEQUENCES, "groups": 2, "segments": SEGMENTS}),
    "sequence_log_weights": (
        vk.sequence_log_weights, {"logp": STATS.logp, "behavior_logp": STATS.logp, "segments": SEGMENTS}),
    "effective_sample_size": (vk.effective_sample_size, {"log_weights": SEQUENCES}),
    "off_policy_baseline": (
        vk.off_policy_baseline, {"rewards": SEQUENCES, "log_weights": SEQUENCES, "score_sqnorm": SEQUENCES, "groups": 2}),
    "Segments.padded": (vk.Segments.padded, {"mask": TOKENS}),
    "Segments.packed": (vk.Segments.packed, {"cu_seqlens": torch.tensor([0, 2, 4])}),
    "Segments.indexed": (vk.Segments.indexed, {"segment_id": torch.tensor([0, 1]), "num_sequences": 2}),
    "Segments.sum": (SEGMENTS.sum, {"values": TOKENS}),
    "Segments.spread": (SEGMENTS.spread, {"per_sequence": SEQUENCES}),
    "grpo": (vk.objectives.ppo_clip, {
        "stats": STATS, "behavior_logp": STATS.logp, "advantages": SEQUENCES, "segments": SEGMENTS}),
    "advantages": (vk.objectives.group_mean_advantages, {"rewards": SEQUENCES, "groups": 2}),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_every_public_function(call: str) -> None:
    """Each argument that is a tensor, as an array, a list and None: a TypeError with the argument and the fix."""
    function, arguments = CALLS[call]
    function(**arguments)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for other in (value.numpy(), value.tolist(), list(value), None):
            if other is None and name == "mask" and call != "Segments.padded":
                continue  # optional
            with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got .*Fix: "):
                function(**{**arguments, name: other})


def test_exact_norms_by_name() -> None:
    """Refused with the way to have them; an array is refused too, and not asked whether it equals "logit"."""
    for value in ("exact", np.ones(4), None):
        with pytest.raises(
            ValueError, match=r"VCPOConfig: score_norm must be .*SequenceGradients.*grads.squared_norms\(\)"
        ):
            vk.VCPOConfig(score_norm=value)  # type: ignore[arg-type]
