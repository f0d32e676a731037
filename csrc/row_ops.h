// The row ops, each on a CPU's threads and on a GPU. Arrays lie in the place's memory, token-sized ones as Tokens'.
#pragma once

#include "common/row_gradient.h"
#include "common/row_statistics.h"
#include "common/rows.h"
#include "common/shard_state.h"

namespace vcpo {

struct CpuPlace {
  int threads;
};
// Launches and does not wait; raises std::runtime_error.
struct CudaPlace {
  int device;
  void* stream;  // a cudaStream_t
};

void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                         const StatisticsOut& statistics, const CpuPlace& place);
void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                         const StatisticsOut& statistics, const CudaPlace& place);

// Of rows that are a shard of their vocabulary: ids count from its first entry, one outside lies in another shard.
void token_states(const Rows& rows, const Tokens& tokens, const Scaling& scaling, const ShardStatesOut& states,
                  const CpuPlace& place);
void token_states(const Rows& rows, const Tokens& tokens, const Scaling& scaling, const ShardStatesOut& states,
                  const CudaPlace& place);

// Writes every element of `out`.
void token_stats_backward(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                          const TokenGradients& gradients, const CpuPlace& place);
void token_stats_backward(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                          const TokenGradients& gradients, const CudaPlace& place);

// Each row's statistics and, in the same pass, its score: writes every element of `out`, c d logp / d logits, and 0
// where masked out or c = 0. coefficients may be null: all 1.
void score_rows(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                const float* coefficients, const StatisticsOut& statistics, const CpuPlace& place);
void score_rows(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                const float* coefficients, const StatisticsOut& statistics, const CudaPlace& place);

}  // namespace vcpo
