#include "score_rows.cuh"

#include <type_traits>

#include "../row_ops.h"
#include "launch.cuh"

namespace vcpo {
namespace {

struct Arguments {
  const Output& out;
  const Tokens& tokens;
  const Scaling& scaling;
  const RowScale scale;
  const float* coefficients;
  const StatisticsOut statistics;
};

template <class Stream, class SoftcapFlag>
void launch_twice_read(const Purpose& purpose, cudaStream_t stream, SoftcapFlag, const Arguments& a) {
  const Shape shape{Stream::kWarps,
                    Stream::kSharedBytes + Stream::kWarps * sizeof(RowState<float>) + sizeof(RowGradient)};
  launch(purpose, shape, stream, score_rows_kernel<Stream, SoftcapFlag::value>, a.out, purpose.rows, a.tokens,
         a.scaling, a.scale, a.coefficients, a.statistics);
}

// False where no cluster can hold a row.
template <class T, class SoftcapFlag>
bool launch_cluster(const Purpose& purpose, const Device& device, cudaStream_t stream, SoftcapFlag,
                    const Arguments& a) {
  using Slice = ResidentSlice<T, kCluster.warps, kCluster.vectors>;
  constexpr std::size_t kOther = (1 + kCluster.warps) * sizeof(RowState<float>) + sizeof(RowGradient);
  const std::int64_t whole = purpose.rows.vocabulary / Slice::C::kSize;
  const ClusterPlan plan = cluster_plan(whole, Slice::bytes(1), kOther, device);
  if (plan.blocks == 0) return false;
  const Shape shape{kCluster.warps, Slice::bytes(plan.capacity) + kOther, plan.blocks};
  launch(purpose, shape, stream, score_rows_cluster_kernel<Slice, SoftcapFlag::value, kClusterBlocks>, a.out,
         purpose.rows, a.tokens, a.scaling, a.scale, a.coefficients, a.statistics, plan.capacity);
  return true;
}

}  // namespace

void score_rows(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                const float* coefficients, const StatisticsOut& statistics, const CudaPlace& place) {
  if (rows.outer * rows.inner == 0) return;
  const Purpose purpose{"score_rows", rows};
  const Device device = device_of(place.device, purpose);
  const bool aligned = is_aligned(rows) && is_aligned(out, rows.dtype);
  const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
  const RowScale scale = row_scale(scaling);
  const Arguments a{out, tokens, scaling, scale, coefficients, statistics};
  with_type(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_flag(scale.softcap, [&](auto softcap) {
      if (!aligned)
        return launch_twice_read<DirectStream<T, kScore.warps, kScore.vectors>>(purpose, stream, softcap, a);
      if (launch_cluster<T>(purpose, device, stream, softcap, a)) return;
      launch_twice_read<AsyncStream<T, kScore.warps, kScore.vectors, kScore.stages>>(purpose, stream, softcap, a);
    });
  });
}

}  // namespace vcpo
