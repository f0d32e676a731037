"""Fused kernels for variance-controlled off-policy reinforcement learning of language models (VCPO, arXiv 2602.17616)."""

from vcpo_kernels import objectives as objectives
from vcpo_kernels._version import __version__
from vcpo_kernels.core.registry import use_backend
from vcpo_kernels.head.linear_token_stats import linear_token_stats
from vcpo_kernels.head.linear_weighted_logp import linear_weighted_logp
from vcpo_kernels.head.patch_head import HeadOutput, patch_head
from vcpo_kernels.parallel.ranks import Ranks
from vcpo_kernels.parallel.shards import VocabularyShard
from vcpo_kernels.rows.token_stats import TokenStats, token_stats
from vcpo_kernels.rows.weighted_logp import weighted_logp
from vcpo_kernels.sequence_gradients.context import SequenceGradients
from vcpo_kernels.sequence_gradients.opob_accumulator import OPOBAccumulator
from vcpo_kernels.sequences.baselines import off_policy_baseline
from vcpo_kernels.sequences.ess import EffectiveSampleSize, effective_sample_size
from vcpo_kernels.sequences.log_weights import sequence_log_weights
from vcpo_kernels.sequences.segments import Segments
from vcpo_kernels.sequences.vcpo import VCPOConfig, VCPOOutput, vcpo_loss
from vcpo_kernels.step_size import EssLearningRate

__all__ = [
    "EffectiveSampleSize",
    "EssLearningRate",
    "HeadOutput",
    "OPOBAccumulator",
    "Ranks",
    "Segments",
    "SequenceGradients",
    "TokenStats",
    "VCPOConfig",
    "VCPOOutput",
    "VocabularyShard",
    "__version__",
    "effective_sample_size",
    "linear_token_stats",
    "linear_weighted_logp",
    "off_policy_baseline",
    "patch_head",
    "sequence_log_weights",
    "token_stats",
    "use_backend",
    "vcpo_loss",
    "weighted_logp",
]
