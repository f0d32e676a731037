"""Every stabilizer in one form: a detached coefficient per token, a value, metrics, and the batch's ESS.

A method is a value, `CISPO(max_ratio=4.0)`, and a function, `cispo(..., max_ratio=4.0)`.

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
from vcpo_kernels.objectives.clipped import CISPO, PPOClip
from vcpo_kernels.objectives.common import CommonTerms, ObjectiveTerms
from vcpo_kernels.objectives.correction import Correction
from vcpo_kernels.objectives.functions import (
    cispo,
    dppo_tv,
    gmpo,
    gspo,
    gspo_token,
    icepop,
    m2po,
    opsm,
    ppo_clip,
    reinforce,
    sapo,
    sequence_masked_is,
    sequence_truncated_is,
    token_masked_is,
    token_truncated_is,
    topr,
    vespo,
)
from vcpo_kernels.objectives.masked import DPPOTV, M2PO, OPSM, IcePop
from vcpo_kernels.objectives.output import ObjectiveOutput
from vcpo_kernels.objectives.sequence_level import GMPO, GSPO, GSPOToken
from vcpo_kernels.objectives.soft import SAPO, VESPO
from vcpo_kernels.objectives.table import ADVANTAGES, OBJECTIVES, Advantage, Objective
from vcpo_kernels.objectives.token_baseline import optimal_token_advantages
from vcpo_kernels.objectives.token_objective import TokenObjective
from vcpo_kernels.objectives.tokens import TokenBatch, times
from vcpo_kernels.objectives.weighted import (
    TOPR,
    Reinforce,
    SequenceMaskedIS,
    SequenceTruncatedIS,
    TokenMaskedIS,
    TokenTruncatedIS,
)

__all__ = [
    "ADVANTAGES",
    "CISPO",
    "DPPOTV",
    "GMPO",
    "GSPO",
    "M2PO",
    "OBJECTIVES",
    "OPSM",
    "SAPO",
    "TOPR",
    "VESPO",
    "Advantage",
    "CommonTerms",
    "Correction",
    "GSPOToken",
    "IcePop",
    "Objective",
    "ObjectiveOutput",
    "ObjectiveTerms",
    "PPOClip",
    "Reinforce",
    "SequenceMaskedIS",
    "SequenceTruncatedIS",
    "TokenBatch",
    "TokenMaskedIS",
    "TokenObjective",
    "TokenTerms",
    "TokenTruncatedIS",
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
