// The row ops on a GPU: addresses of device memory, a device and a stream. Raise std::runtime_error.
#pragma once

#include "../common/rows.h"

namespace vcpo {
namespace cuda {

struct Queue {
  int device;
  void* stream;  // a cudaStream_t
};

void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling, float* logp, float* entropy,
                         float* score_sqnorm, float* lse, const Queue& queue);

// grad_logp, grad_entropy and target_logits may be null.
void token_stats_backward(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                          const float* logp, const float* entropy, const float* lse, const float* grad_logp,
                          const float* grad_entropy, const float* target_logits, const Queue& queue);

// coefficients may be null: all 1.
void score_rows(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                const float* coefficients, float* logp, float* entropy, float* score_sqnorm, float* lse,
                const Queue& queue);

}  // namespace cuda
}  // namespace vcpo
