// From entries to the state of a row: a lane's sums, then a warp's, a block's and a cluster's, by the merge rule of
// csrc/common/row_state.h. Always in the same order: no atomics, and nothing depends on the rows around.
#pragma once

#include <cmath>

#include "../common/row_state.h"
#include "../common/rows.h"
#include "../common/shard_state.h"
#include "device.cuh"
#include "row_chunks.cuh"

namespace vcpo {

// exp2 of anything below is 0 in fp32; a -inf is held here before it multiplies that 0.
constexpr float kExponentFloor = -160.0f;

// Entries become values whose multiple by RowScale::scale is the exponent u in base 2. A -inf, a masked entry, stays
// one.
template <bool kSoftcap>
VCPO_DEVICE float value_of(float z, const RowScale& s) {
  if constexpr (kSoftcap) return z == -INFINITY ? z : tanhf(z * s.inv_softcap);
  return z;
}

// Takes an entry out of the sums: the sampled token, which joins at the end (row_state.h). Once a row, so that the
// whole chunk's comparisons cost nothing.
template <class C>
VCPO_DEVICE void leave_out(std::int64_t y, std::int64_t chunk, int lane, float (&z)[C::kEntries]) {
  if (!C::holds(chunk, y)) return;
  const int at = C::offset_of(y, chunk, lane);
#pragma unroll
  for (int j = 0; j < C::kEntries; ++j) z[j] = C::entry_offset(j) == at ? -INFINITY : z[j];
}

// A lane's state, relative to a value, with its entries of a chunk added. 9 instructions an entry of bf16: 1 to unpack,
// max, subtract, multiply, ex2, and 4 for the three sums, of which max once more keeps -inf * 0 out; the rescaling is
// once a chunk. One fma in place of subtract and multiply would be relative to u, which at 1e10 is rounded by a
// thousand binades; an H100 issues 19 in the time that 3 TB/s bring an entry.
template <bool kSoftcap, int kEntries>
VCPO_DEVICE void absorb(RowState<float>& state, float (&z)[kEntries], const RowScale& s) {
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    z[j] = value_of<kSoftcap>(z[j], s);
    top = fmaxf(top, z[j]);
  }
  if (top > state.reference) {
    state = rebased(state, top, s.scale);
    state.reference = top;
  }
  const float from = state.reference == -INFINITY ? 0.0f : state.reference;
  // Sums of one chunk apart: a long row's error grows with its chunks, not with its entries.
  float sum_exp = 0, sum_centred = 0, sum_sq = 0;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const float t = (z[j] - from) * s.scale;
    const float e = device::exp2_fast(t);
    sum_exp += e;
    sum_centred = fmaf(fmaxf(t, kExponentFloor), e, sum_centred);
    sum_sq = fmaf(e, e, sum_sq);
  }
  state.sum_exp += sum_exp, state.sum_centred += sum_centred, state.sum_sq += sum_sq;
}

VCPO_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += device::shuffle_xor(x, lanes);
  return x;
}

// All lanes' states as one, which every lane gets, bit for bit the same.
VCPO_DEVICE RowState<float> merged_in_warp(const RowState<float>& own, float scale) {
  float reference = own.reference;
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
    reference = fmaxf(reference, device::shuffle_xor(reference, lanes));
  const RowState<float> s = rebased(own, reference, scale);
  return {reference, warp_sum(s.sum_exp), warp_sum(s.sum_centred), warp_sum(s.sum_sq)};
}

// One state a lane, of up to 32 that lie in memory.
template <class At>
VCPO_DEVICE RowState<float> merged_from(int count, int lane, float scale, const At& at) {
  return merged_in_warp(lane < count ? at(lane) : empty_row_state<float>(), scale);
}

// All lanes' states of a block as one, which every thread gets. `warps`: one place a warp in shared memory.
VCPO_DEVICE RowState<float> merged_in_block(const RowState<float>& own, float scale, RowState<float>* warps, int count,
                                            int warp, int lane) {
  const RowState<float> of_warp = merged_in_warp(own, scale);
  if (lane == 0) warps[warp] = of_warp;
  device::block_sync();
  return merged_from(count, lane, scale, [&](int w) { return warps[w]; });
}

// A sampled token: its index in the row (any where the id is not of the vocabulary), its logit.
struct Target {
  std::int64_t y;
  bool known;
  float z;
};
template <class T>
VCPO_DEVICE Target target_of(const T* row, std::int64_t vocabulary, std::int64_t id) {
  const bool known = id >= 0 && id < vocabulary;
  const std::int64_t y = known ? id : 0;
  return {y, known, entry_at(row, y)};
}

template <bool kSoftcap>
VCPO_DEVICE RowSummary statistics_of(const RowState<float>& rest, const Target& target, const RowScale& s) {
  const double value = value_of<kSoftcap>(target.z, s);
  RowSummary stats = statistics_of(rest, value * s.scale, s.scale);
  if (!target.known) stats.forget_token();
  return stats;
}

// --- what a pass over a row leaves of it, by where that goes: statistics, or the state of a shard of the vocabulary
// ---

// The entry that stays out of the sums. -1, none, in a shard that does not hold the target; statistics, whose end puts
// an entry back in any case, leave out some entry.
VCPO_DEVICE std::int64_t left_out(const StatisticsOut&, const Target& target) { return target.y; }
VCPO_DEVICE std::int64_t left_out(const ShardStatesOut&, const Target& target) { return target.known ? target.y : -1; }

VCPO_DEVICE void leave_nothing(const StatisticsOut& out, std::int64_t at) { out.write(at, {}); }
VCPO_DEVICE void leave_nothing(const ShardStatesOut& out, std::int64_t at) { out.write(at, empty_shard_state()); }

template <bool kSoftcap>
VCPO_DEVICE void leave_row(const StatisticsOut& out, std::int64_t at, const RowState<float>& rest, const Target& target,
                           const RowScale& s) {
  out.write(at, statistics_of<kSoftcap>(rest, target, s));
}
// In double, once a row: the reference is found again as a logit, and without a softcap to the bit.
template <bool kSoftcap>
VCPO_DEVICE void leave_row(const ShardStatesOut& out, std::int64_t at, const RowState<float>& rest,
                           const Target& target, const RowScale& s) {
  const double reference = static_cast<double>(rest.reference) * s.scale;
  const RowState<double> state{reference, rest.sum_exp, rest.sum_centred, rest.sum_sq};
  out.write(at, shard_state(state, s, target.known ? target.z : -INFINITY));
}

}  // namespace vcpo
