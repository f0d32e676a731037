// From entries to the state of a row: a lane's sums, then a warp's, a block's and a cluster's, by the merge rule of
// csrc/common/row_state.h. Always in the same order: no atomics, and nothing depends on the rows around.
#pragma once

#include <cmath>

#include "../common/row_state.h"
#include "../common/rows.h"
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

// A lane's state with its entries of a chunk added. 8 instructions an entry of bf16: 1 to unpack, max, fma, ex2, and 4
// for the three sums, of which max once more keeps -inf * 0 out; the rescaling is once a chunk.
template <bool kSoftcap, int kEntries>
VCPO_DEVICE void absorb(RowState<float>& state, float (&z)[kEntries], const RowScale& s) {
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    z[j] = value_of<kSoftcap>(z[j], s);
    top = fmaxf(top, z[j]);
  }
  const float u = top * s.scale;
  if (u > state.ref) {
    state = shifted(state, u - state.ref);
    state.ref = u;
  }
  const float from = state.ref == -INFINITY ? 0.0f : state.ref;
  // Sums of one chunk apart: a long row's error grows with its chunks, not with its entries.
  float sum = 0, dot = 0, sq = 0;
#pragma unroll
  for (int j = 0; j < kEntries; ++j) {
    const float t = fmaf(z[j], s.scale, -from);
    const float e = device::exp2_fast(t);
    sum += e;
    dot = fmaf(fmaxf(t, kExponentFloor), e, dot);
    sq = fmaf(e, e, sq);
  }
  state.sum += sum, state.dot += dot, state.sq += sq;
}

VCPO_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += device::shuffle_xor(x, lanes);
  return x;
}

// All lanes' states as one, which every lane gets, bit for bit the same.
VCPO_DEVICE RowState<float> warp_merge(const RowState<float>& own) {
  float ref = own.ref;
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) ref = fmaxf(ref, device::shuffle_xor(ref, lanes));
  const RowState<float> moved = own.ref == ref ? own : shifted(own, ref - own.ref);
  return {ref, warp_sum(moved.sum), warp_sum(moved.dot), warp_sum(moved.sq)};
}

// One state a lane, of up to 32 that lie in memory.
template <class At>
VCPO_DEVICE RowState<float> merge_of(int count, int lane, const At& at) {
  return warp_merge(lane < count ? at(lane) : empty_row_state<float>());
}

// All lanes' states of a block as one, which every thread gets. `warps`: one place a warp in shared memory.
VCPO_DEVICE RowState<float> block_merge(const RowState<float>& own, RowState<float>* warps, int count, int warp,
                                        int lane) {
  const RowState<float> of_warp = warp_merge(own);
  if (lane == 0) warps[warp] = of_warp;
  device::block_sync();
  return merge_of(count, lane, [&](int w) { return warps[w]; });
}

struct StatisticsOut {
  float *logp, *entropy, *score_sqnorm, *lse;
  VCPO_DEVICE void write(std::int64_t at, const RowStatistics& s) const {
    logp[at] = s.logp, entropy[at] = s.entropy, score_sqnorm[at] = s.score_sqnorm, lse[at] = s.lse;
  }
};

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
VCPO_DEVICE RowStatistics statistics_of(const RowState<float>& rest, const Target& target, const RowScale& s) {
  const float value = value_of<kSoftcap>(target.z, s);
  RowStatistics stats = finish(rest, rest.sum == 0 ? value * s.scale : fmaf(value, s.scale, -rest.ref));
  if (!target.known) stats.logp = stats.score_sqnorm = NAN;
  return stats;
}

}  // namespace vcpo
