"""Every public function that takes tensors, with arguments that it takes, for tests that change one thing about all of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

import vcpo_kernels as vk
from vcpo_kernels import objectives as ob

B, T, V, H = 4, 5, 7, 6


@functools.cache
def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A public function and its arguments, those that are tensors to be replaced one by one."""
    logits, ids, mask = torch.randn(B, T, V), torch.randint(0, V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    c = torch.randn(B, T)
    stats, segments = vk.token_stats(logits, ids), vk.Segments.padded(mask)
    of_head = {"hidden": torch.randn(B, T, H), "weight": torch.randn(V, H), "bias": torch.randn(V)}
    of_head |= {"token_ids": ids, "mask": mask}
    common = {"behavior_logp": c - 3, "rewards": torch.rand(B), "groups": torch.tensor([0, 0, 1, 1])}
    sequence = {"log_weights": torch.zeros(B), "rewards": torch.rand(B), "groups": torch.tensor([0, 0, 1, 1])}
    out = {
        "token_stats": (vk.token_stats, {"logits": logits, "token_ids": ids, "mask": mask}),
        "weighted_logp": (vk.weighted_logp, {"logits": logits, "token_ids": ids, "coefficients": c, "mask": mask}),
        "linear_token_stats": (vk.linear_token_stats, of_head),
        "linear_weighted_logp": (vk.linear_weighted_logp, of_head | {"coefficients": c}),
        "Segments.padded": (vk.Segments.padded, {"mask": mask}),
        "Segments.packed": (vk.Segments.packed, {"cu_seqlens": torch.tensor([0, 2, 5]), "mask": mask[:1]}),
        "Segments.indexed": (
            vk.Segments.indexed,
            {"segment_id": torch.zeros(B, T, dtype=torch.int64), "num_sequences": 1, "mask": mask},
        ),
        "segments.sum": (segments.sum, {"values": c}),
        "segments.spread": (segments.spread, {"per_sequence": torch.rand(B)}),
        "vcpo_loss": (vk.vcpo_loss, {"stats": stats, **common, "segments": segments}),
        "sequence_log_weights": (
            vk.sequence_log_weights, {"logp": c, "behavior_logp": c, "segments": segments},
        ),
        "effective_sample_size": (
            vk.effective_sample_size, {"log_weights": torch.zeros(B), "valid": torch.ones(B, dtype=torch.bool)},
        ),
        "off_policy_baseline": (vk.off_policy_baseline, sequence | {"score_sqnorm": torch.rand(B)}),
        "opob_advantages": (ob.opob_advantages, sequence | {"score_sqnorm": torch.rand(B)}),
        "optimal_token_advantages": (
            ob.optimal_token_advantages,
            {"rewards": common["rewards"], "groups": 2, "stats": stats, "segments": segments, "token_weights": c.exp()},
        ),
        "group_mean_advantages": (ob.group_mean_advantages, {"rewards": torch.rand(B), "groups": common["groups"]}),
    }  # fmt: skip
    for name, entry in ob.OBJECTIVES.items():
        function = getattr(entry, "function", entry)
        arguments = {"stats": stats, "behavior_logp": c - 3, "advantages": torch.rand(B), "segments": segments}
        if "proximal_logp" in inspect.signature(function).parameters:
            arguments["proximal_logp"] = c - 3
        out[name] = (function, arguments)
    return out
