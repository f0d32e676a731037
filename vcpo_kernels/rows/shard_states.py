"""What travels between ranks that share a row's vocabulary, and what is made of it.

Layer: rows [N, v] -> states [5, N] -> tokens [N]. Of a shard's entries z (after the softcap) without the sampled token's,
five numbers a token in fp32 (float64 of float64 logits), with t_v = (z_v - reference) log2(e) / temperature and e_v = 2^t_v:

    reference     some z_v of the shard, at most a few binades below the largest; exactly one where there is no softcap.
                  -inf: no entry but -inf
    sum_exp       sum e_v
    sum_centred   sum t_v e_v
    sum_sq        sum e_v^2
    target_logit  the sampled token's logit before the softcap; -inf where another shard holds it

The row state of csrc/common/row_state.h, with the reference as a logit: distances between shards' references are then taken
before anything is rounded, and temperatures near 0 or logits of 1e9 lose no digits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vcpo_kernels.rows.statistics import RETURNS

NUMBERS = 5
EMPTY = (-float("inf"), 0.0, 0.0, 0.0, -float("inf"))  # of no entries


class MergedStatistics(NamedTuple):
    """Of each row, from all shards: RowStatistics, and what the backward of a shard needs in the target's place.

    target_logit: the sampled token's, before the softcap. peak, log_total: lse = peak / temperature + log_total where the token
    is not the likeliest, which keeps digits that lse as one number has not; peak is a logit, after the softcap.
    """

    logp: Tensor
    entropy: Tensor
    score_sqnorm: Tensor
    lse: Tensor
    target_logit: Tensor
    peak: Tensor
    log_total: Tensor


MERGED_RETURNS = f"{RETURNS}, Tensor target_logit, Tensor peak, Tensor log_total"
