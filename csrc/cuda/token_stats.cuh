// token_stats: one block a row. Forward: one read of the row, 16 bytes written; or, of a shard of the vocabulary, the
// 20 bytes of its state. Backward: one read, one write; a row whose gradients are 0 is one write, a masked row is not
// read at all, and one whose statistics lost p's digits when they were saved (lost_digits) is read twice.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "row_chunks.cuh"
#include "row_gradient.cuh"
#include "row_reduce.cuh"
#include "row_streams.cuh"

namespace vcpo {

// The state of a row without its target, which every thread gets. `warps`: Stream::kWarps places in shared memory.
template <class Stream, bool kSoftcap, class T>
VCPO_DEVICE RowState<float> row_state(const Stream& stream, const T* row, std::int64_t vocabulary, std::int64_t y,
                                      const RowScale& scale, RowState<float>* warps, int warp, int lane) {
  using C = typename Stream::C;
  const std::int64_t whole = vocabulary / C::kSize;
  RowState<float> state = empty_row_state<float>();
  // First, while the stream's copies are on their way.
  if (whole * C::kSize < vocabulary && whole % Stream::kWarps == warp) {
    float z[C::kEntries];
    load_ragged_chunk<C>(row, vocabulary, whole, lane, z);
    leave_out<C>(y, whole, lane, z);
    absorb<kSoftcap>(state, z, scale);
  }
  stream.for_each([&](std::int64_t chunk, float (&z)[C::kEntries]) {
    leave_out<C>(y, chunk, lane, z);
    absorb<kSoftcap>(state, z, scale);
  });
  return merged_in_block(state, scale.scale, warps, Stream::kWarps, warp, lane);
}

// Out: StatisticsOut or ShardStatesOut.
template <class Stream, bool kSoftcap, int kBlocks, class Out>
VCPO_KERNEL(Stream::kWarps* kLanes, kBlocks)
token_stats_forward_kernel(const Rows rows, const Tokens tokens, const RowScale scale, const Out out) {
  if constexpr (Stream::kNeedsBulk && !device::kHasBulk) return device::unsupported();
  using T = typename Stream::C::T;
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
  const Position position = position_of(rows, device::block());
  const Token token = token_of(rows, tokens, position.outer, position.inner);
  if (!token.valid) {
    if (device::thread() == 0) leave_nothing(out, token.at);
    return;
  }
  char* shared = device::shared_memory();
  const T* row = row_at<T>(rows, position);
  const Stream stream(shared, row, rows.vocabulary / Stream::C::kSize, warp, lane);
  stream.start();
  const Target target = target_of(row, rows.vocabulary, tokens.ids[token.at]);
  RowState<float>* warps = reinterpret_cast<RowState<float>*>(shared + Stream::kSharedBytes);
  const RowState<float> rest =
      row_state<Stream, kSoftcap>(stream, row, rows.vocabulary, left_out(out, target), scale, warps, warp, lane);
  if (device::thread() == 0) leave_row<kSoftcap>(out, token.at, rest, target, scale);
}

template <class C, int kWarps, bool kSoftcap, bool kEntropy, int kBlocks>
VCPO_KERNEL(kWarps* kLanes, kBlocks)
token_stats_backward_kernel(const Output out, const Rows rows, const Tokens tokens, const Scaling scaling,
                            const RowScale scale, const TokenGradients gradients) {
  using T = typename C::T;
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
  const Position position = position_of(rows, device::block());
  const Token token = token_of(rows, tokens, position.outer, position.inner);
  const RowPart<C> part(rows.vocabulary, 0, rows.vocabulary / C::kSize, true, warp, kWarps);
  T* row_out = output_at<T>(out, position);
  const float g = token.valid && gradients.grad_logp != nullptr ? gradients.grad_logp[token.at] : 0.0f;
  const float h = kEntropy && token.valid ? gradients.grad_entropy[token.at] : 0.0f;
  if (g == 0.0f && h == 0.0f) return write_zeros<C>(row_out, rows.vocabulary, part, lane);

  const T* row = row_at<T>(rows, position);
  RowGradient* shared = reinterpret_cast<RowGradient*>(device::shared_memory());
  const bool block = gradients.target_logits != nullptr;
  const Target target = target_of(row, rows.vocabulary, tokens.ids[token.at]);
  const TokenGradient saved = gradients.of(token.at, target.known || block, g, h);
  RowState<float> rest;
  const bool again = !block && lost_digits(saved);  // the same for every thread
  if (again) {
    using Stream = DirectStream<T, kWarps, 1, C::aligned>;  // one vector: registers
    const Stream stream(nullptr, row, rows.vocabulary / Stream::C::kSize, warp, lane);
    RowState<float>* warps = reinterpret_cast<RowState<float>*>(shared + 1);
    rest = row_state<Stream, kSoftcap>(stream, row, rows.vocabulary, target.y, scale, warps, warp, lane);
  }
  if (device::thread() == 0) {
    const float z = block ? gradients.target_logits[token.at] : target.z;
    const Log2Sum lse2 = again ? statistics_of<kSoftcap>(rest, target, scale).lse2 : saved_lse2(z, saved, scale);
    *shared = row_gradient(lse2, target.known ? target.y : -1, saved, scaling, scale);
  }
  device::block_sync();  // in place, the target is read before anything is written
  write_gradient<C>(row_out, row, rows.vocabulary, part, lane, GradientOf<kSoftcap, kEntropy>(*shared, scale));
}

}  // namespace vcpo
