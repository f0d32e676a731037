#include "token_stats.h"

#include <cmath>
#include <cstring>

#include "row_loop.h"

namespace vcpo {

void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling, float* logp, float* entropy,
                         float* score_sqnorm, float* lse, int threads) {
  const ForwardRow forward = kernels().forward[static_cast<int>(rows.dtype)];
  const RowScale scale = row_scale(scaling);
  for_each_row(rows, threads, kSmallChunk, [&](std::int64_t o, std::int64_t i) {
    const Entry entry = entry_of(rows, tokens, o, i);
    RowStatistics stats{0.0f, 0.0f, 0.0f, 0.0f};
    if (entry.live) {
      const std::int64_t y = tokens.ids[entry.at];
      const bool known = y >= 0 && y < rows.vocabulary;
      stats = forward(row_at(rows, o, i), rows.vocabulary, known ? y : 0, scale);
      if (!known) stats.logp = stats.score_sqnorm = NAN;
    }
    logp[entry.at] = stats.logp;
    entropy[entry.at] = stats.entropy;
    score_sqnorm[entry.at] = stats.score_sqnorm;
    lse[entry.at] = stats.lse;
  });
}

void token_stats_backward(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                          const float* logp, const float* entropy, const float* lse, const float* grad_logp,
                          const float* grad_entropy, const float* target_logits, int threads) {
  const BackwardRow backward = kernels().backward[static_cast<int>(rows.dtype)];
  const RowScale scale = row_scale(scaling);
  const WritePlan plan = write_plan(out, rows, threads);
  for_each_row(rows, threads, plan.chunk_bytes, [&](std::int64_t o, std::int64_t i) {
    const Entry entry = entry_of(rows, tokens, o, i);
    char* d = output_at(out, rows.dtype, o, i);
    const float g = entry.live && grad_logp != nullptr ? grad_logp[entry.at] : 0.0f;
    const float h = entry.live && grad_entropy != nullptr ? grad_entropy[entry.at] : 0.0f;
    if (g == 0.0f && h == 0.0f) {
      std::memset(d, 0, static_cast<std::size_t>(rows.vocabulary * bytes_of(rows.dtype)));
      return;
    }
    const char* row = row_at(rows, o, i);
    const std::int64_t y = tokens.ids[entry.at];
    const bool known = y >= 0 && y < rows.vocabulary, block = target_logits != nullptr;
    const double z = block ? target_logits[entry.at] : known ? element(row, rows.dtype, y) : NAN;
    const TokenGradient token{known || block ? logp[entry.at] : NAN, entropy[entry.at], lse[entry.at], g, h};
    backward(d, row, rows.vocabulary, row_gradient(z, known ? y : -1, token, scaling, scale), scale, plan.stream);
  });
}

}  // namespace vcpo
