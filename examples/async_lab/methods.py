"""The methods under comparison, in a table: objective, baseline, norms, and whether ESS scales the step.

All share the learner, the rollouts of a seed, the normalisation of rewards (by the group's standard deviation) and the
aggregation (mean over tokens, then over sequences), so that what differs is the method alone. Hyperparameters are those of
the papers or of the trainers' defaults (`vcpo_kernels.objectives` has the sources). Adding a method is a line in `METHODS`,
with a class of `vcpo_kernels.objectives` or a `TokenObjective` of your own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import vcpo_kernels as vk
from vcpo_kernels import objectives
from vcpo_kernels.objectives import ObjectiveOutput, TokenObjective

Output = ObjectiveOutput | vk.VCPOOutput
MAX_SEQUENCE_WEIGHT = 8.0


@dataclass(frozen=True)
class Method:
    """title: for figures. objective: with the group's mean as baseline; None: `vk.vcpo_loss`, the off-policy optimal
    baseline. exact_norms: its gradient norms from `vk.SequenceGradients`, else from the logits. step_rule: of
    `vk.EssLearningRate`; None: full steps.
    """

    title: str
    objective: TokenObjective | None = None
    exact_norms: bool = False
    step_rule: str | None = None

    def loss(
        self,
        stats: vk.TokenStats,
        behavior_logp: Tensor,
        rewards: Tensor,
        groups: int,
        segments: vk.Segments,
        norms: Tensor | None = None,
    ) -> Output:
        """The loss of a batch. groups: sequences per prompt. norms: [B], squared, where they are exact."""
        if self.objective is None:
            config = vk.VCPOConfig(max_weight=MAX_SEQUENCE_WEIGHT, score_norm="logit" if norms is None else norms)
            return vk.vcpo_loss(stats, behavior_logp, rewards, groups, segments, config)
        return self.objective(stats, behavior_logp, group_advantages(rewards, groups), segments)


def group_advantages(rewards: Tensor, groups: int) -> Tensor:
    """(R_i - mean) / population standard deviation of the prompt's group; 0 where all its rewards are equal."""
    grouped = rewards.view(-1, groups)
    centred = grouped - grouped.mean(1, keepdim=True)
    spread = grouped.std(1, correction=0, keepdim=True)
    return (centred / spread.clamp(min=1e-8)).where(spread > 1e-8, 0.0).view(-1)


BY_SEQUENCE = "seq-mean-token-mean"
_TRUNCATED = objectives.SequenceTruncatedIS(max_weight=MAX_SEQUENCE_WEIGHT)
METHODS: dict[str, Method] = {
    "none": Method("no correction", objectives.Reinforce()),
    "token-tis": Method("token truncated IS (2)", objectives.TokenTruncatedIS(max_weight=2.0)),
    "seq-tis": Method("sequence truncated IS (8)", _TRUNCATED),
    "seq-mis": Method("sequence masked IS (8)", objectives.SequenceMaskedIS(max_weight=MAX_SEQUENCE_WEIGHT)),
    "icepop": Method("IcePop (0.5 to 5)", objectives.IcePop(min_weight=0.5, max_weight=5.0, aggregation=BY_SEQUENCE)),
    "ppo-clip": Method("PPO clip (0.2)", objectives.PPOClip(clip_low=0.2, clip_high=0.2)),
    "gspo": Method("GSPO (3e-4, 4e-4)", objectives.GSPO(clip_low=3e-4, clip_high=4e-4)),
    "cispo": Method("CISPO (5)", objectives.CISPO(max_ratio=5.0, aggregation=BY_SEQUENCE)),
    "opsm": Method("OPSM (0.5)", objectives.OPSM(threshold=0.5)),
    "m2po": Method("M2PO (0.04)", objectives.M2PO(threshold=0.04, aggregation=BY_SEQUENCE)),
    "topr": Method("TOPR", objectives.TOPR(aggregation=BY_SEQUENCE)),
    "ess": Method("ESS step alone", _TRUNCATED, step_rule="sqrt"),
    "opob": Method("OPOB alone, logit norms"),
    "opob-exact": Method("OPOB alone, exact norms", exact_norms=True),
    "vcpo": Method("VCPO, logit norms", step_rule="sqrt"),
    "vcpo-exact": Method("VCPO, exact norms", exact_norms=True, step_rule="sqrt"),
}
