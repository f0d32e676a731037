"""VCPOTrainingConfig: GRPOConfig with VCPO's switches as fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig
from trl.trainer.base_config import _BaseConfig

from vcpo_kernels.core.checks import Check
from vcpo_kernels.integrations.trl.options import AGGREGATION_OF, GRPO, refuse_options
from vcpo_kernels.sequences.aggregation import AGGREGATIONS
from vcpo_kernels.sequences.baselines import WEIGHTINGS
from vcpo_kernels.step_size import RULES

SCORE_NORMS = ("logit", "exact")
NO_RULE = "none"


@dataclass
class VCPOTrainingConfig(GRPOConfig):
    """Arguments of `VCPOTrainer`: all of GRPOConfig's, and VCPO's own.

    max_weight: truncation of a sequence's weight in the loss, w^_i = min(w_i, max_weight); None: untruncated.
    baseline_weighting: what the group's baseline is weighted by: "paper", "estimator", "official", "mean" or "length"
        (`vcpo_kernels.VCPOConfig`).
    aggregation: how tokens are weighed; None: as loss_type says ("dapo": "token-mean", "grpo": "seq-mean-token-mean",
        "dr_grpo": "seq-mean-token-sum-norm" with max_completion_length).
    score_norm: the squared gradient norms in the baseline. "logit": the free proxy. "exact": `SequenceGradients`, whose
        norms come of the backward that gradients come of; beside a KL penalty or an entropy bonus, of one more.
    ess_rule, ess_reference: rate used = rate * min(1, rho / ess_reference)^(1/2) ("sqrt", the paper's) or the first power
        ("linear"), with rho = ESS / B of the window; "none" leaves the rate alone.
    ess_max_weight: truncation of the weights that ESS is taken of. None: unclipped.

    `scale_rewards` ("group" or "none") says whether advantages are divided by the group's standard deviation.

    Raises TypeError or ValueError naming the field, and ValueError for every option of GRPOConfig that VCPOTrainer does not
    honour, by name with the reason.
    """

    max_weight: float | None = field(
        default=8.0, metadata={"help": "Truncation of sequence importance weights in the loss. None: untruncated."}
    )
    baseline_weighting: str = field(
        default="paper", metadata={"help": f"Weighting of the group baseline: {', '.join(WEIGHTINGS)}."}
    )
    aggregation: str | None = field(
        default=None, metadata={"help": f"Weighting of tokens: {', '.join(AGGREGATIONS)}. None: what loss_type says."}
    )
    score_norm: str = field(
        default="logit", metadata={"help": "Squared gradient norms in the baseline: 'logit' (free) or 'exact'."}
    )
    ess_rule: str = field(
        default="sqrt", metadata={"help": "Step scaling by the effective sample size: 'sqrt', 'linear' or 'none'."}
    )
    ess_reference: float = field(default=1.0, metadata={"help": "ESS ratio from which on steps are full."})
    ess_max_weight: float | None = field(
        default=None, metadata={"help": "Truncation of the weights that ESS is taken of. None: unclipped."}
    )

    def __post_init__(self) -> None:
        check = Check("VCPOTrainingConfig")
        refuse_options(check.where, self, GRPOConfig, _BaseConfig, GRPO)  # before others complain of the same option
        super().__post_init__()
        check_ess(check, self)
        self.ess_max_weight = check.optional_positive_float("ess_max_weight", self.ess_max_weight)
        check.choice("baseline_weighting", self.baseline_weighting, tuple(WEIGHTINGS))
        check.choice("score_norm", self.score_norm, SCORE_NORMS)
        if self.aggregation is not None:
            check.choice("aggregation", self.aggregation, AGGREGATIONS)
            of_loss_type = AGGREGATION_OF[self.loss_type]
            if self.loss_type != "dapo" and self.aggregation != of_loss_type:
                raise check.value_error(
                    f"aggregation={self.aggregation!r} and loss_type={self.loss_type!r} (which is {of_loss_type!r}) "
                    "disagree. Leave one of them out."
                )
        checkpointing: Any = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
        if self.score_norm == "exact" and checkpointing.get("use_reentrant"):
            raise check.value_error(
                "score_norm='exact' cannot see into reentrant checkpoints. Set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or score_norm='logit'."
            )
        self._check_window(check)

    def _check_window(self, check: Check) -> None:
        """A step's window must hold whole groups, or a baseline would be taken over a part of one."""
        accumulated, generated = self.gradient_accumulation_steps, self.steps_per_generation
        assert generated is not None
        assert self.num_generations is not None
        together = math.gcd(accumulated, generated)  # micro-batches that one generation and one window always share
        if together == generated:
            return
        rows = self.per_device_train_batch_size * together
        if rows % self.num_generations:
            raise check.value_error(
                f"steps_per_generation={generated} and gradient_accumulation_steps={accumulated} give an optimizer "
                f"step {rows} sequences of a generation on each process, which must be whole groups of "
                f"num_generations={self.num_generations}. Make per_device_train_batch_size * {together} a multiple of it, or "
                "gradient_accumulation_steps a multiple of steps_per_generation."
            )

    @property
    def token_aggregation(self) -> str:
        """The `aggregation` of VCPOConfig that this comes to."""
        return self.aggregation or AGGREGATION_OF[self.loss_type]


def check_ess(check: Check, args: Any) -> None:
    """The fields that both trainers have, checked; numbers become floats."""
    args.max_weight = check.optional_positive_float("max_weight", args.max_weight)
    args.ess_reference = check.positive_float("ess_reference", args.ess_reference)
    check.choice("ess_rule", args.ess_rule, (*RULES, NO_RULE))
