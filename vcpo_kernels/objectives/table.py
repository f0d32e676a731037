"""OBJECTIVES and ADVANTAGES: every method by name, configured, for trainers and configuration files to look up.

Adding one is adding a line.
"""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

from vcpo_kernels.objectives import advantages, clipped, masked, sequence_level, soft, token_baseline, weighted
from vcpo_kernels.objectives.functions import as_function
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.token_objective import TokenObjective

Entry = TypeVar("Entry")


class Named(UserDict[str, Entry]):
    """Entries by name. An unknown name is a KeyError that lists those there are."""

    def __missing__(self, name: str) -> Entry:
        raise KeyError(f"{name!r} is none of {', '.join(self)}.")


@dataclass(frozen=True)
class Objective:
    """A method with some hyperparameters, under a name of its own.

    title: for figures and logs. value: the configured method. source: where the formula is from.

    >>> from vcpo_kernels import objectives
    >>> objectives.OBJECTIVES["dapo"].value
    PPOClip(aggregation='token-mean', clip_low=0.2, clip_high=0.28, dual_clip=None)
    >>> objectives.OBJECTIVES["dapo"].hyperparameters
    {'aggregation': 'token-mean', 'clip_high': 0.28}
    """

    title: str
    value: TokenObjective
    source: str

    @property
    def function(self) -> Callable[..., ObjectiveOutput]:
        """The method's function, whose defaults are the method's own."""
        return as_function(type(self.value))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What distinguishes this entry from the function's defaults."""
        held = {f.name: (getattr(self.value, f.name), f.default) for f in fields(self.value)}
        return {name: value for name, (value, default) in held.items() if value != default}

    @property
    def knobs(self) -> Mapping[str, Any]:
        """Deprecated: `hyperparameters`."""
        warnings.warn(
            "Objective.knobs is called hyperparameters; knobs goes with the next version.", DeprecationWarning, 2
        )
        return self.hyperparameters

    def __call__(self, *args: Any, **kwargs: Any) -> ObjectiveOutput:
        """The value's loss of a batch; keyword arguments may override hyperparameters."""
        return self.value.with_keywords(*args, **kwargs)


OBJECTIVES = Named(
    reinforce=Objective("REINFORCE, no correction", weighted.Reinforce(), "Williams, 1992"),
    rloo=Objective(
        "RLOO (with leave_one_out advantages)", weighted.Reinforce(aggregation="seq-mean-token-sum"), "arXiv 2402.14740"
    ),
    token_truncated_is=Objective("token truncated IS", weighted.TokenTruncatedIS(), "TIS, 2025; verl; TRL"),
    sequence_truncated_is=Objective(
        "sequence truncated IS", weighted.SequenceTruncatedIS(), "arXiv 2602.17616; verl; TRL"
    ),
    token_masked_is=Objective("token masked IS", weighted.TokenMaskedIS(), "MIS, 2025; TRL"),
    sequence_masked_is=Objective("sequence masked IS", weighted.SequenceMaskedIS(), "MIS, 2025; TRL"),
    topr=Objective("TOPR", weighted.TOPR(), "arXiv 2503.14286"),
    ppo=Objective("PPO clip", clipped.PPOClip(aggregation="token-mean"), "arXiv 1707.06347"),
    ppo_dual_clip=Objective(
        "PPO dual clip", clipped.PPOClip(dual_clip=3.0, aggregation="token-mean"), "arXiv 1912.09729"
    ),
    grpo=Objective("GRPO", clipped.PPOClip(aggregation="seq-mean-token-mean"), "arXiv 2402.03300"),
    dapo=Objective("DAPO", clipped.PPOClip(clip_high=0.28, aggregation="token-mean"), "arXiv 2503.14476"),
    dr_grpo=Objective("Dr.GRPO", clipped.PPOClip(aggregation="seq-mean-token-sum-norm"), "arXiv 2503.20783"),
    bnpo=Objective("BNPO (TRL's)", clipped.PPOClip(aggregation="token-mean"), "TRL"),
    cispo=Objective("CISPO", clipped.CISPO(), "arXiv 2506.13585"),
    gspo=Objective("GSPO", sequence_level.GSPO(), "arXiv 2507.18071"),
    gspo_token=Objective("GSPO-token", sequence_level.GSPOToken(), "arXiv 2507.18071"),
    gmpo=Objective("GMPO", sequence_level.GMPO(), "arXiv 2507.20673"),
    sapo=Objective("SAPO", soft.SAPO(), "arXiv 2511.20347"),
    vespo=Objective("VESPO", soft.VESPO(), "arXiv 2602.10693"),
    icepop=Objective("IcePop", masked.IcePop(), "Ling team, 2025"),
    opsm=Objective("OPSM", masked.OPSM(), "arXiv 2512.02556"),
    m2po=Objective("M2PO", masked.M2PO(), "arXiv 2510.01161"),
    dppo_tv=Objective("DPPO (binary TV)", masked.DPPOTV(), "arXiv 2602.04879"),
)


@dataclass(frozen=True)
class Advantage:
    """A way to turn rewards into advantages: function(rewards, groups, *needs).

    needs: what it takes beside rewards and groups, in order: "lengths" [B], "log_weights" [B], "score_sqnorm" [B], "stats",
    "segments".
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ()


ADVANTAGES = Named(
    mean=Advantage(advantages.group_mean_advantages),
    mean_std=Advantage(advantages.group_normalized_advantages),
    leave_one_out=Advantage(advantages.leave_one_out_advantages),
    length=Advantage(advantages.length_weighted_advantages, ("lengths",)),
    opob=Advantage(advantages.opob_advantages, ("log_weights", "score_sqnorm")),
    optimal_token=Advantage(token_baseline.optimal_token_advantages, ("stats", "segments")),
)
