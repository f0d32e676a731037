"""Every stabilizer in one form: a detached coefficient per token, a value, metrics, and the batch's ESS.

Layer: tokens [N]. `OBJECTIVES` lists them by name; docs/objectives.md has formulas, sources and how to add one's own.
"""

from vcpo_kernels.objectives.build import CommonTerms, TokenTerms, objective_from_coefficients
from vcpo_kernels.objectives.clipped import cispo, ppo_clip
from vcpo_kernels.objectives.correction import Correction
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.reinforce import (
    reinforce,
    sequence_masked_is,
    sequence_truncated_is,
    token_masked_is,
    token_truncated_is,
    topr,
)
from vcpo_kernels.objectives.sequence_level import gmpo, gspo, gspo_token
from vcpo_kernels.objectives.tokens import TokenBatch, times

__all__ = [
    "CommonTerms",
    "Correction",
    "ObjectiveOutput",
    "TokenBatch",
    "TokenTerms",
    "cispo",
    "gmpo",
    "gspo",
    "gspo_token",
    "objective_from_coefficients",
    "ppo_clip",
    "reinforce",
    "sequence_masked_is",
    "sequence_truncated_is",
    "times",
    "token_masked_is",
    "token_truncated_is",
    "topr",
]
