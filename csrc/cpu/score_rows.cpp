#include "score_rows.h"

#include <cmath>
#include <cstring>

#include "row_loop.h"

namespace vcpo {

// Two passes over a row, of which the second finds it in the L2 cache: 304 KB for 151,936 bf16 entries.
void score_rows(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                const float* coefficients, float* logp, float* entropy, float* score_sqnorm, float* lse, int threads) {
  const ForwardRow forward = kernels().forward[static_cast<int>(rows.dtype)];
  const BackwardRow backward = kernels().backward[static_cast<int>(rows.dtype)];
  const RowScale scale = row_scale(scaling);
  const WritePlan plan = write_plan(out, rows, threads);
  for_each_row(rows, threads, plan.chunk_bytes, [&](std::int64_t o, std::int64_t i) {
    const Entry entry = entry_of(rows, tokens, o, i);
    char* d = output_at(out, rows.dtype, o, i);
    RowStatistics stats{0.0f, 0.0f, 0.0f, 0.0f};
    float c = 0.0f;
    if (entry.live) {
      const char* row = row_at(rows, o, i);
      const std::int64_t y = tokens.ids[entry.at];
      const bool known = y >= 0 && y < rows.vocabulary;
      stats = forward(row, rows.vocabulary, known ? y : 0, scale);
      if (!known) stats.logp = stats.score_sqnorm = NAN;
      c = coefficients != nullptr ? coefficients[entry.at] : 1.0f;
      if (c != 0.0f) {
        const double z = known ? element(row, rows.dtype, y) : NAN;
        const TokenGradient token{stats.logp, stats.entropy, stats.lse, c, 0.0f};
        backward(d, row, rows.vocabulary, row_gradient(z, known ? y : -1, token, scaling, scale), scale, plan.stream);
      }
    }
    if (c == 0.0f) std::memset(d, 0, static_cast<std::size_t>(rows.vocabulary * bytes_of(rows.dtype)));
    logp[entry.at] = stats.logp;
    entropy[entry.at] = stats.entropy;
    score_sqnorm[entry.at] = stats.score_sqnorm;
    lse[entry.at] = stats.lse;
  });
}

}  // namespace vcpo
