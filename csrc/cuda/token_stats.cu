#include "token_stats.cuh"

#include <type_traits>

#include "launch.cuh"
#include "row_ops.h"

namespace vcpo {
namespace {

template <class Stream, class SoftcapFlag>
void launch_forward(const Purpose& purpose, cudaStream_t stream, SoftcapFlag, const Tokens& tokens,
                    const RowScale& scale, const StatisticsOut& out) {
  const Shape shape{Stream::kWarps, Stream::kSharedBytes + Stream::kWarps * sizeof(RowState<float>)};
  launch(purpose, shape, stream, token_stats_forward_kernel<Stream, SoftcapFlag::value, kForwardBlocks>, purpose.rows,
         tokens, scale, out);
}

}  // namespace

namespace cuda {

void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling, float* logp, float* entropy,
                         float* score_sqnorm, float* lse, const Queue& queue) {
  if (rows.outer * rows.inner == 0) return;
  const Purpose purpose{"token_stats_forward", rows};
  const Path path = stream_path(is_aligned(rows), device_of(queue.device, purpose));
  const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
  const RowScale scale = row_scale(scaling);
  const StatisticsOut out{logp, entropy, score_sqnorm, lse};
  with_type(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_flag(scale.softcap, [&](auto softcap) {
      switch (path) {
        case Path::kBulk:
          return launch_forward<BulkStream<T, kForward.warps, kForward.vectors, kForward.stages>>(
              purpose, stream, softcap, tokens, scale, out);
        case Path::kAsync:
          return launch_forward<AsyncStream<T, kForward.warps, kForward.vectors, kForward.stages>>(
              purpose, stream, softcap, tokens, scale, out);
        case Path::kDirect:
          return launch_forward<DirectStream<T, kForward.warps, kForward.vectors>>(purpose, stream, softcap, tokens,
                                                                                   scale, out);
      }
    });
  });
}

void token_stats_backward(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                          const float* logp, const float* entropy, const float* lse, const float* grad_logp,
                          const float* grad_entropy, const float* target_logits, const Queue& queue) {
  if (rows.outer * rows.inner == 0) return;
  const Purpose purpose{"token_stats_backward", rows};
  device_of(queue.device, purpose);
  const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
  const RowScale scale = row_scale(scaling);
  const BackwardIn in{logp, entropy, lse, grad_logp, grad_entropy, target_logits};
  const Shape shape{kBackward.warps, sizeof(RowGradient)};
  with_type(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_flag(is_aligned(rows) && is_aligned(out, rows.dtype), [&](auto aligned) {
      using C = Chunk<T, decltype(aligned)::value, kBackward.vectors>;
      with_flag(scale.softcap, [&](auto softcap) {
        with_flag(grad_entropy != nullptr, [&](auto entropy_flag) {
          launch(purpose, shape, stream,
                 token_stats_backward_kernel<C, kBackward.warps, decltype(softcap)::value,
                                             decltype(entropy_flag)::value, kBackwardBlocks>,
                 out, rows, tokens, scaling, scale, in);
        });
      });
    });
  });
}

}  // namespace cuda
}  // namespace vcpo
