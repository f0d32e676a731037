// score_rows: the statistics of token_stats and, in the place of the logits or beside them, c d logp / d logits.
//
// From sm_90 on the row is held on chip, over the shared memory of a cluster's blocks (a bf16 row of 151,936 entries is
// 304 KB): one read and one write of it in all. Otherwise it is read a second time, out of the L2 cache where that
// still has it.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "row_chunks.cuh"
#include "row_gradient.cuh"
#include "row_reduce.cuh"
#include "row_streams.cuh"
#include "token_stats.cuh"

namespace vcpo {

VCPO_DEVICE RowGradient score_gradient(const Target& target, const RowSummary& stats, float c, const Scaling& scaling,
                                       const RowScale& scale) {
  const TokenGradient saved{stats.logp, stats.entropy, stats.lse, c, 0.0f};
  return row_gradient(stats.lse2, target.known ? target.y : -1, saved, scaling, scale);
}

// coefficients may be null: all 1.
VCPO_DEVICE float coefficient_of(const float* coefficients, const Token& token) {
  if (!token.valid) return 0.0f;
  return coefficients != nullptr ? coefficients[token.at] : 1.0f;
}

// One block a row, which it reads twice.
template <class Stream, bool kSoftcap>
VCPO_KERNEL(Stream::kWarps* kLanes, 1)
score_rows_kernel(const Output out, const Rows rows, const Tokens tokens, const Scaling scaling, const RowScale scale,
                  const float* coefficients, const StatisticsOut statistics) {
  using C = typename Stream::C;
  using T = typename C::T;
  constexpr int kWarps = Stream::kWarps;
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
  const Position position = position_of(rows, device::block());
  const Token token = token_of(rows, tokens, position.outer, position.inner);
  const RowPart<C> part(rows.vocabulary, 0, rows.vocabulary / C::kSize, true, warp, kWarps);
  T* row_out = output_at<T>(out, position);
  const float c = coefficient_of(coefficients, token);
  if (!token.valid) {
    if (device::thread() == 0) statistics.write(token.at, {});
    return write_zeros<C>(row_out, rows.vocabulary, part, lane);
  }
  char* shared = device::shared_memory();
  const T* row = row_at<T>(rows, position);
  const Stream stream(shared, row, rows.vocabulary / Stream::C::kSize, warp, lane);
  stream.start();
  const Target target = target_of(row, rows.vocabulary, tokens.ids[token.at]);
  RowState<float>* warps = reinterpret_cast<RowState<float>*>(shared + Stream::kSharedBytes);
  RowGradient* gradient = reinterpret_cast<RowGradient*>(warps + kWarps);
  const RowState<float> rest =
      row_state<Stream, kSoftcap>(stream, row, rows.vocabulary, target.y, scale, warps, warp, lane);
  if (device::thread() == 0) {
    const RowSummary stats = statistics_of<kSoftcap>(rest, target, scale);
    statistics.write(token.at, stats);
    *gradient = score_gradient(target, stats, c, scaling, scale);
  }
  device::block_sync();  // every warp has read all of its entries, and the target, before any writes in place
  if (c == 0.0f) return write_zeros<C>(row_out, rows.vocabulary, part, lane);
  write_gradient<C>(row_out, row, rows.vocabulary, part, lane, GradientOf<kSoftcap, false>(*gradient, scale));
}

// A block's slice of a row, all of it in shared memory: the chunks [begin, end), a barrier each.
template <class T, int kWarps_, int kVectors>
struct ResidentSlice {
  using C = Chunk<T, true, kVectors>;
  static constexpr int kWarps = kWarps_;

  const T* row;
  Share share;
  std::int64_t begin;
  int lane;
  char* chunks;
  device::Barrier* full;

  // Shared memory for slices of up to `chunks` chunks.
  VCPO_HOST_DEVICE static constexpr std::size_t bytes(std::int64_t chunks) {
    const std::size_t exact = static_cast<std::size_t>(chunks) * (C::kBytes + sizeof(device::Barrier));
    return (exact + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  }
  VCPO_DEVICE ResidentSlice(char* shared, std::int64_t capacity, const T* row_, std::int64_t begin_, std::int64_t end,
                            int warp, int lane_)
      : row(row_),
        share(share_of(begin_, end, warp, kWarps)),
        begin(begin_),
        lane(lane_),
        chunks(shared),
        full(reinterpret_cast<device::Barrier*>(shared + capacity * C::kBytes)) {}

  VCPO_DEVICE device::Vector* place(std::int64_t chunk) const {
    return reinterpret_cast<device::Vector*>(chunks + (chunk - begin) * C::kBytes);
  }
  VCPO_DEVICE void start() const {
    if (lane == 0) {
      for (std::int64_t k = 0; k < share.count; ++k) device::barrier_init(full + (share.chunk(k) - begin));
      device::barrier_init_done();
      for (std::int64_t k = 0; k < share.count; ++k) {
        const std::int64_t chunk = share.chunk(k);
        device::copy_bulk(place(chunk), row + chunk * C::kSize, C::kBytes, full + (chunk - begin));
      }
    }
    device::warp_sync();
  }
  VCPO_DEVICE void read(std::int64_t chunk, float (&z)[C::kEntries]) const {
    device::Vector raw[C::kVectors];
    read_shared_chunk<C>(place(chunk), lane, raw);
    unpack_chunk<C>(raw, z);
  }
};

VCPO_DEVICE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// One cluster a row. Block `rank` holds an equal share of the whole chunks; the ragged one, at most 2 KB, is the last
// block's and read twice. `capacity`: chunks that a block has room for.
template <class Slice, bool kSoftcap, int kBlocks>
VCPO_KERNEL(Slice::kWarps* kLanes, kBlocks)
score_rows_cluster_kernel(const Output out, const Rows rows, const Tokens tokens, const Scaling scaling,
                          const RowScale scale, const float* coefficients, const StatisticsOut statistics,
                          const int capacity) {
  if constexpr (!device::kHasBulk) return device::unsupported();
  using C = typename Slice::C;
  using T = typename C::T;
  constexpr int kWarps = Slice::kWarps;
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
  const int rank = device::cluster_rank(), blocks = device::cluster_size();
  const Position position = position_of(rows, device::block() / blocks);
  const Token token = token_of(rows, tokens, position.outer, position.inner);
  const std::int64_t vocabulary = rows.vocabulary, whole = vocabulary / C::kSize;
  const std::int64_t begin = smaller(static_cast<std::int64_t>(rank) * capacity, whole);
  const std::int64_t end = smaller(begin + capacity, whole);
  const RowPart<C> part(vocabulary, begin, end, rank == blocks - 1, warp, kWarps);
  T* row_out = output_at<T>(out, position);
  const float c = coefficient_of(coefficients, token);
  if (!token.valid) {
    if (rank == 0 && device::thread() == 0) statistics.write(token.at, {});
    return write_zeros<C>(row_out, vocabulary, part, lane);
  }
  char* shared = device::shared_memory();
  const T* row = row_at<T>(rows, position);
  const Slice slice(shared, capacity, row, begin, end, warp, lane);
  slice.start();
  const Target target = target_of(row, vocabulary, tokens.ids[token.at]);
  RowState<float>* of_block = reinterpret_cast<RowState<float>*>(shared + Slice::bytes(capacity));
  RowState<float>* warps = of_block + 1;
  RowGradient* gradient = reinterpret_cast<RowGradient*>(warps + kWarps);

  RowState<float> state = empty_row_state<float>();
  float z[C::kEntries];
  if (part.ragged >= 0) {
    load_ragged_chunk<C>(row, vocabulary, part.ragged, lane, z);
    leave_out<C>(target.y, part.ragged, lane, z);
    absorb<kSoftcap>(state, z, scale);
  }
  for (std::int64_t k = 0; k < part.share.count; ++k) {
    const std::int64_t chunk = part.share.chunk(k);
    device::barrier_wait(slice.full + (chunk - begin), 0);
    slice.read(chunk, z);
    leave_out<C>(target.y, chunk, lane, z);
    absorb<kSoftcap>(state, z, scale);
  }
  state = merged_in_block(state, scale.scale, warps, kWarps, warp, lane);
  if (device::thread() == 0) *of_block = state;
  device::cluster_sync();  // every block's state is there, and every block has read its slice and the target
  state = merged_from(blocks, lane, scale.scale, [&](int other) {
    static_assert(sizeof(RowState<float>) == sizeof(float4), "a further sum takes a second load");
    const float4 s = device::load_of_block(of_block, other);
    return RowState<float>{s.x, s.y, s.z, s.w};
  });
  if (device::thread() == 0) {
    const RowSummary stats = statistics_of<kSoftcap>(state, target, scale);
    if (rank == 0) statistics.write(token.at, stats);
    *gradient = score_gradient(target, stats, c, scaling, scale);
  }
  device::block_sync();    // the gradient's numbers are there: the meeting below orders no memory
  device::cluster_meet();  // no block ends, and its shared memory with it, while another reads there
  if (c == 0.0f) return write_zeros<C>(row_out, vocabulary, part, lane);

  const GradientOf<kSoftcap, false> apply(*gradient, scale);
  for (std::int64_t k = 0; k < part.share.count; ++k) {
    const std::int64_t chunk = part.share.chunk(k);
    slice.read(chunk, z);
    apply.template apply<C>(chunk, lane, z);
    store_chunk<C>(row_out, chunk, lane, z);
  }
  if (part.ragged >= 0) {
    load_ragged_chunk<C>(row, vocabulary, part.ragged, lane, z);
    apply.template apply<C>(part.ragged, lane, z);
    store_ragged_chunk<C>(row_out, vocabulary, part.ragged, lane, z);
  }
}

}  // namespace vcpo
