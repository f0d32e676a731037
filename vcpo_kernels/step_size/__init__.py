"""The optimizer's step: scaled by the effective sample size of the batch behind it.

Layer: scalars.
"""

from vcpo_kernels.step_size.observed import Observable
from vcpo_kernels.step_size.rate import RULES, EssLearningRate

__all__ = ["RULES", "EssLearningRate", "Observable"]
