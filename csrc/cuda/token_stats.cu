#include "token_stats.cuh"

#include <type_traits>

#include "../row_ops.h"
#include "launch.cuh"

namespace vcpo {
namespace {

template <class Stream, class SoftcapFlag, class Out>
void launch_forward(const Purpose& purpose, cudaStream_t stream, SoftcapFlag, const Tokens& tokens,
                    const RowScale& scale, const Out& out) {
  const Shape shape{Stream::kWarps, Stream::kSharedBytes + Stream::kWarps * sizeof(RowState<float>)};
  launch(purpose, shape, stream, token_stats_forward_kernel<Stream, SoftcapFlag::value, kForwardBlocks, Out>,
         purpose.rows, tokens, scale, out);
}

// One pass over the rows, of which `out`, StatisticsOut or ShardStatesOut, says what it leaves.
template <class Out>
void forward(const Purpose& purpose, const Tokens& tokens, const Scaling& scaling, const Out& out,
             const CudaPlace& place) {
  const Rows& rows = purpose.rows;
  if (rows.outer * rows.inner == 0) return;
  const Path path = stream_path(is_aligned(rows), device_of(place.device, purpose));
  const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
  const RowScale scale = row_scale(scaling);
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

}  // namespace

void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                         const StatisticsOut& statistics, const CudaPlace& place) {
  forward({"token_stats_forward", rows}, tokens, scaling, statistics, place);
}

void token_states(const Rows& rows, const Tokens& tokens, const Scaling& scaling, const ShardStatesOut& states,
                  const CudaPlace& place) {
  forward({"token_states", rows}, tokens, scaling, states, place);
}

void token_stats_backward(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                          const TokenGradients& gradients, const CudaPlace& place) {
  if (rows.outer * rows.inner == 0) return;
  const Purpose purpose{"token_stats_backward", rows};
  device_of(place.device, purpose);
  const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
  const RowScale scale = row_scale(scaling);
  const Shape shape{kBackward.warps, sizeof(RowGradient) + kBackward.warps * sizeof(RowState<float>)};
  with_type(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_flag(is_aligned(rows) && is_aligned(out, rows.dtype), [&](auto aligned) {
      using C = Chunk<T, decltype(aligned)::value, kBackward.vectors>;
      with_flag(scale.softcap, [&](auto softcap) {
        with_flag(gradients.grad_entropy != nullptr, [&](auto entropy_flag) {
          launch(purpose, shape, stream,
                 token_stats_backward_kernel<C, kBackward.warps, decltype(softcap)::value,
                                             decltype(entropy_flag)::value, kBackwardBlocks>,
                 out, rows, tokens, scaling, scale, gradients);
        });
      });
    });
  });
}

}  // namespace vcpo
