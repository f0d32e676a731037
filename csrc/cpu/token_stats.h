// token_stats on the CPU: one pass over each row for the forward, one for the backward.
#pragma once

#include "rows.h"

namespace vcpo {

void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling, float* logp, float* entropy,
                         float* score_sqnorm, float* lse, int threads);

// Writes every element of `out`. grad_* may be null. target_logits, where not null: the rows hold a block of their
// vocabulary, ids count from its first entry, one outside [0, vocabulary) lies in another block, and the sampled
// token's logit is given.
void token_stats_backward(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                          const float* logp, const float* entropy, const float* lse, const float* grad_logp,
                          const float* grad_entropy, const float* target_logits, int threads);

}  // namespace vcpo
