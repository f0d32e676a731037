"""Every stabilizer in one form: a detached coefficient per token, a value, metrics, and the batch's ESS.

Layer: tokens [N]. `OBJECTIVES` and `ADVANTAGES` list them by name; docs/objectives.md has formulas, sources, and how to add
one's own.
"""

from vcpo_kernels.objectives.advantages import (
    group_mean_advantages,
    group_normalized_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    opob_advantages,
)
from vcpo_kernels.objectives.build import TokenTerms, objective_from_coefficients
from vcpo_kernels.objectives.clipped import cispo, ppo_clip
from vcpo_kernels.objectives.common import CommonTerms
from vcpo_kernels.objectives.correction import Correction
from vcpo_kernels.objectives.masked import dppo_tv, icepop, m2po, opsm
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.sequence_level import gmpo, gspo, gspo_token
from vcpo_kernels.objectives.soft import sapo, vespo
from vcpo_kernels.objectives.table import ADVANTAGES, OBJECTIVES, Advantage, Objective
from vcpo_kernels.objectives.token_baseline import optimal_token_advantages
from vcpo_kernels.objectives.tokens import TokenBatch, times
from vcpo_kernels.objectives.weighted import (
    reinforce,
    sequence_masked_is,
    sequence_truncated_is,
    token_masked_is,
    token_truncated_is,
    topr,
)

__all__ = [
    "ADVANTAGES",
    "OBJECTIVES",
    "Advantage",
    "CommonTerms",
    "Correction",
    "Objective",
    "ObjectiveOutput",
    "TokenBatch",
    "TokenTerms",
    "cispo",
    "dppo_tv",
    "gmpo",
    "group_mean_advantages",
    "group_normalized_advantages",
    "gspo",
    "gspo_token",
    "icepop",
    "leave_one_out_advantages",
    "length_weighted_advantages",
    "m2po",
    "objective_from_coefficients",
    "opob_advantages",
    "opsm",
    "optimal_token_advantages",
    "ppo_clip",
    "reinforce",
    "sapo",
    "sequence_masked_is",
    "sequence_truncated_is",
    "times",
    "token_masked_is",
    "token_truncated_is",
    "topr",
    "vespo",
]
