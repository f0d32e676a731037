// The gradient of one row, entry by entry, from the numbers of csrc/common/row_gradient.h.
#pragma once

#include "../common/row_gradient.h"
#include "device.cuh"
#include "row_chunks.cuh"
#include "row_reduce.cuh"
#include "row_streams.cuh"

namespace vcpo {

// d logits_v = p_v (k1 log2 p_v + k0) through the softcap; the sampled token's apart. 5.5 instructions an entry of bf16
// without a gradient to the entropy: 1 to unpack, subtract, fma, ex2, multiply, half a pack.
template <bool kSoftcap, bool kEntropy>
struct GradientOf {
  RowScale s;
  float reference, offset, k0, k1, target;
  std::int64_t y;

  VCPO_DEVICE GradientOf(const RowGradient& g, const RowScale& scale)
      : s(scale), reference(g.reference), offset(g.offset), k0(g.k0), k1(g.k1), target(g.target), y(g.target_index) {}

  template <class C>
  VCPO_DEVICE void apply(std::int64_t chunk, int lane, float (&z)[C::kEntries]) const {
    if (C::holds(chunk, y)) {  // never for y = -1
      apply_at<C, true>(C::offset_of(y, chunk, lane), z);
    } else {
      apply_at<C, false>(0, z);
    }
  }

 private:
  template <class C, bool kHasTarget>
  VCPO_DEVICE void apply_at(int at, float (&z)[C::kEntries]) const {
#pragma unroll
    for (int j = 0; j < C::kEntries; ++j) {
      const float value = value_of<kSoftcap>(z[j], s);
      const float t = fmaf(value - reference, s.scale, offset);
      z[j] = device::exp2_fast(t) * (kEntropy ? fmaf(fmaxf(t, kExponentFloor), k1, k0) : k0);
      if (kHasTarget && C::entry_offset(j) == at) z[j] = target;
      if constexpr (kSoftcap) z[j] *= 1.0f - fminf(1.0f, value * value);  // 0, not 0 * inf, at -inf
    }
  }
};

// A warp's share of a row's whole chunks [begin, end), and the ragged one after `end` where it is this warp's.
template <class C>
struct RowPart {
  Share share;
  std::int64_t ragged;  // -1: none, or another warp's
  VCPO_DEVICE RowPart(std::int64_t vocabulary, std::int64_t begin, std::int64_t end, bool last, int warp, int warps)
      : share(share_of(begin, end, warp, warps)),
        ragged(last && end * C::kSize < vocabulary && (end - begin) % warps == warp ? end : -1) {}
};

// Reads a row again, or for the first time, and writes its gradient; in place each lane writes what itself has read.
template <class C, class Gradient>
VCPO_DEVICE void write_gradient(typename C::T* out, const typename C::T* row, std::int64_t vocabulary,
                                const RowPart<C>& part, int lane, const Gradient& gradient) {
  float z[C::kEntries];
  for (std::int64_t k = 0; k < part.share.count; ++k) {
    const std::int64_t chunk = part.share.chunk(k);
    load_chunk<C>(row, chunk, lane, z);
    gradient.template apply<C>(chunk, lane, z);
    store_chunk<C>(out, chunk, lane, z);
  }
  if (part.ragged >= 0) {
    load_ragged_chunk<C>(row, vocabulary, part.ragged, lane, z);
    gradient.template apply<C>(part.ragged, lane, z);
    store_ragged_chunk<C>(out, vocabulary, part.ragged, lane, z);
  }
}

template <class C>
VCPO_DEVICE void write_zeros(typename C::T* out, std::int64_t vocabulary, const RowPart<C>& part, int lane) {
  float zeros[C::kEntries];
#pragma unroll
  for (int j = 0; j < C::kEntries; ++j) zeros[j] = 0.0f;
  for (std::int64_t k = 0; k < part.share.count; ++k) store_chunk<C>(out, part.share.chunk(k), lane, zeros);
  if (part.ragged >= 0) store_ragged_chunk<C>(out, vocabulary, part.ragged, lane, zeros);
}

}  // namespace vcpo
