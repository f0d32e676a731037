// score_rows on the CPU: each row's statistics, and its score times a coefficient, while the row is in the cache.
#pragma once

#include "rows.h"

namespace vcpo {

// Writes every element of `out`: c d logp / d logits, and 0 where masked out or c = 0. coefficients may be null: all 1.
void score_rows(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                const float* coefficients, float* logp, float* entropy, float* score_sqnorm, float* lse, int threads);

}  // namespace vcpo
