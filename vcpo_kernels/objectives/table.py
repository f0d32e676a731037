"""OBJECTIVES and ADVANTAGES: every method by name, its knobs as data, for trainers and configuration files to look up.

Adding one is adding a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vcpo_kernels.objectives import advantages, clipped, masked, sequence_level, soft, token_baseline, weighted
from vcpo_kernels.objectives.output import ObjectiveOutput


@dataclass(frozen=True)
class Objective:
    """A method: call it as its function, with the knobs as defaults.

    title: for figures and logs. function: see its docstring. knobs: what distinguishes this entry from the function's
    defaults. source: where the formula is from.

    >>> from vcpo_kernels import objectives
    >>> objectives.OBJECTIVES["dapo"].knobs
    {'clip_high': 0.28, 'aggregation': 'token-mean'}
    """

    title: str
    function: Callable[..., ObjectiveOutput]
    source: str
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> ObjectiveOutput:
        """`function` with the entry's knobs, which keyword arguments override."""
        return self.function(*args, **{**self.knobs, **kwargs})


OBJECTIVES: dict[str, Objective] = {
    "reinforce": Objective("REINFORCE, no correction", weighted.reinforce, "Williams, 1992"),
    "rloo": Objective(
        "RLOO (with leave_one_out advantages)",
        weighted.reinforce,
        "arXiv 2402.14740",
        {"aggregation": "seq-mean-token-sum"},
    ),
    "token_truncated_is": Objective("token truncated IS", weighted.token_truncated_is, "TIS, 2025; verl; TRL"),
    "sequence_truncated_is": Objective(
        "sequence truncated IS", weighted.sequence_truncated_is, "arXiv 2602.17616; verl; TRL"
    ),
    "token_masked_is": Objective("token masked IS", weighted.token_masked_is, "MIS, 2025; TRL"),
    "sequence_masked_is": Objective("sequence masked IS", weighted.sequence_masked_is, "MIS, 2025; TRL"),
    "topr": Objective("TOPR", weighted.topr, "arXiv 2503.14286"),
    "ppo": Objective("PPO clip", clipped.ppo_clip, "arXiv 1707.06347", {"aggregation": "token-mean"}),
    "ppo_dual_clip": Objective(
        "PPO dual clip", clipped.ppo_clip, "arXiv 1912.09729", {"dual_clip": 3.0, "aggregation": "token-mean"}
    ),
    "grpo": Objective("GRPO", clipped.ppo_clip, "arXiv 2402.03300", {"aggregation": "seq-mean-token-mean"}),
    "dapo": Objective("DAPO", clipped.ppo_clip, "arXiv 2503.14476", {"clip_high": 0.28, "aggregation": "token-mean"}),
    "dr_grpo": Objective("Dr.GRPO", clipped.ppo_clip, "arXiv 2503.20783", {"aggregation": "seq-mean-token-sum-norm"}),
    "bnpo": Objective("BNPO (TRL's)", clipped.ppo_clip, "TRL", {"aggregation": "token-mean"}),
    "cispo": Objective("CISPO", clipped.cispo, "arXiv 2506.13585"),
    "gspo": Objective("GSPO", sequence_level.gspo, "arXiv 2507.18071"),
    "gspo_token": Objective("GSPO-token", sequence_level.gspo_token, "arXiv 2507.18071"),
    "gmpo": Objective("GMPO", sequence_level.gmpo, "arXiv 2507.20673"),
    "sapo": Objective("SAPO", soft.sapo, "arXiv 2511.20347"),
    "vespo": Objective("VESPO", soft.vespo, "arXiv 2602.10693"),
    "icepop": Objective("IcePop", masked.icepop, "Ling team, 2025"),
    "opsm": Objective("OPSM", masked.opsm, "arXiv 2512.02556"),
    "m2po": Objective("M2PO", masked.m2po, "arXiv 2510.01161"),
    "dppo_tv": Objective("DPPO (binary TV)", masked.dppo_tv, "arXiv 2602.04879"),
}


@dataclass(frozen=True)
class Advantage:
    """A way to turn rewards into advantages: function(rewards, groups, *needs).

    needs: what it takes beside rewards and groups, in order: "lengths" [B], "log_weights" [B], "score_sqnorm" [B], "stats",
    "segments".
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ()


ADVANTAGES: dict[str, Advantage] = {
    "mean": Advantage(advantages.group_mean_advantages),
    "mean_std": Advantage(advantages.group_normalized_advantages),
    "leave_one_out": Advantage(advantages.leave_one_out_advantages),
    "length": Advantage(advantages.length_weighted_advantages, ("lengths",)),
    "opob": Advantage(advantages.opob_advantages, ("log_weights", "score_sqnorm")),
    "optimal_token": Advantage(token_baseline.optimal_token_advantages, ("stats", "segments")),
}
