#include <cmath>
#include <cstring>

#include "../row_ops.h"
#include "row_loop.h"

namespace vcpo {

void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                         const StatisticsOut& statistics, const CpuPlace& place) {
  const ForwardRow forward = kernels().forward[static_cast<int>(rows.dtype)];
  const RowScale scale = row_scale(scaling);
  for_each_row(rows, place.threads, kSmallChunk, [&](std::int64_t o, std::int64_t i) {
    const Token token = token_of(rows, tokens, o, i);
    RowStatistics stats{};
    if (token.valid) {
      const std::int64_t y = tokens.ids[token.at];
      const bool known = y >= 0 && y < rows.vocabulary;
      stats = forward(row_at(rows, o, i), rows.vocabulary, known ? y : 0, scale);
      if (!known) stats.forget_token();
    }
    statistics.write(token.at, stats);
  });
}

void token_states(const Rows& rows, const Tokens& tokens, const Scaling& scaling, const ShardStatesOut& states,
                  const CpuPlace& place) {
  const StateRow state = kernels().state[static_cast<int>(rows.dtype)];
  const RowScale scale = row_scale(scaling);
  for_each_row(rows, place.threads, kSmallChunk, [&](std::int64_t o, std::int64_t i) {
    const Token token = token_of(rows, tokens, o, i);
    ShardState out = empty_shard_state();
    if (token.valid) {
      const char* row = row_at(rows, o, i);
      const std::int64_t y = tokens.ids[token.at];
      const bool in_sight = y >= 0 && y < rows.vocabulary;
      const float target = in_sight ? static_cast<float>(element(row, rows.dtype, y)) : -INFINITY;
      out = shard_state(state(row, rows.vocabulary, in_sight ? y : -1, scale), scale, target);
    }
    states.write(token.at, out);
  });
}

void token_stats_backward(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                          const TokenGradients& gradients, const CpuPlace& place) {
  const BackwardRow backward = kernels().backward[static_cast<int>(rows.dtype)];
  const ForwardRow forward = kernels().forward[static_cast<int>(rows.dtype)];
  const RowScale scale = row_scale(scaling);
  const WritePlan plan = write_plan(out, rows, place.threads);
  for_each_row(rows, place.threads, plan.chunk_bytes, [&](std::int64_t o, std::int64_t i) {
    const Token token = token_of(rows, tokens, o, i);
    char* d = output_at(out, rows.dtype, o, i);
    const float g = token.valid && gradients.grad_logp != nullptr ? gradients.grad_logp[token.at] : 0.0f;
    const float h = token.valid && gradients.grad_entropy != nullptr ? gradients.grad_entropy[token.at] : 0.0f;
    if (g == 0.0f && h == 0.0f) {
      std::memset(d, 0, static_cast<std::size_t>(rows.vocabulary * bytes_of(rows.dtype)));
      return;
    }
    const char* row = row_at(rows, o, i);
    const std::int64_t y = tokens.ids[token.at];
    const bool known = y >= 0 && y < rows.vocabulary, block = gradients.target_logits != nullptr;
    const double z = block ? gradients.target_logits[token.at] : known ? element(row, rows.dtype, y) : NAN;
    const TokenGradient saved = gradients.of(token.at, known || block, g, h);
    const Log2Sum lse2 = known && !block && lost_digits(saved) ? forward(row, rows.vocabulary, y, scale).lse2
                                                               : saved_lse2(z, saved, scale);
    const RowGradient gradient = row_gradient(lse2, known ? y : -1, saved, scaling, scale);
    backward(d, row, rows.vocabulary, gradient, scale, plan.stream);
  });
}

}  // namespace vcpo
