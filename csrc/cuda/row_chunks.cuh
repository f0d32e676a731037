// A row in chunks, and a thread's entries of a chunk: which they are, how they are loaded, unpacked and stored.
//
// A chunk belongs to one warp. Aligned rows: a lane holds kVectors vectors of 16 bytes, and a warp's lanes lie side by
// side, so that one load of a warp is 512 consecutive bytes. Other rows: single entries in the same manner. Which entry
// is whose depends on nothing but the layout, so that a row is summed in the same order in any batch.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"
#include "../common/rows.h"
#include "device.cuh"

namespace vcpo {

constexpr int kLanes = 32;
constexpr std::int64_t kVectorBytes = 16;

template <class T_, bool kAligned, int kVectors_>
struct Chunk {
  using T = T_;
  static constexpr bool aligned = kAligned;
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));  // entries of a vector
  static constexpr int kVectors = kVectors_;
  static constexpr int kEntries = kVectors * kWidth;        // of a lane
  static constexpr std::int64_t kSize = kLanes * kEntries;  // of a warp
  static constexpr std::int64_t kBytes = kSize * sizeof(T);

  // Where in a chunk a lane's j-th entry is: a number of the lane's own, and one that is known at compile time.
  VCPO_DEVICE static constexpr int lane_offset(int lane) { return kAligned ? lane * kWidth : lane; }
  VCPO_DEVICE static constexpr int entry_offset(int j) {
    return kAligned ? j / kWidth * kLanes * kWidth + j % kWidth : j * kLanes;
  }
  VCPO_DEVICE static std::int64_t index(std::int64_t chunk, int lane, int j) {
    return chunk * kSize + (lane_offset(lane) + entry_offset(j));
  }
  VCPO_DEVICE static bool holds(std::int64_t chunk, std::int64_t v) {
    return v >= chunk * kSize && v < (chunk + 1) * kSize;
  }
  // The entry_offset of entry v of the row, where this lane holds it: a lane's j-th entry is v where that is
  // entry_offset(j).
  VCPO_DEVICE static int offset_of(std::int64_t v, std::int64_t chunk, int lane) {
    return static_cast<int>(v - chunk * kSize) - lane_offset(lane);
  }
};

template <class T>
VCPO_DEVICE void unpack(const device::Vector& v, float* z) {
  const std::uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      z[i] = from_bits(word[i]);
    } else {
      const float2 pair = device::unpack2<T>(word[i]);
      z[2 * i] = pair.x, z[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
VCPO_DEVICE device::Vector pack(const float* z) {
  std::uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      word[i] = bits_of(z[i]);
    } else {
      word[i] = device::pack2<T>(z[2 * i], z[2 * i + 1]);
    }
  }
  return {word[0], word[1], word[2], word[3]};
}

template <class T>
VCPO_DEVICE float entry_at(const T* row, std::int64_t v) {
  if constexpr (sizeof(T) == 4) {
    return row[v];
  } else {
    return device::unpack2<T>(row[v].bits).x;
  }
}
template <class T>
VCPO_DEVICE T to_entry(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{static_cast<std::uint16_t>(device::pack2<T>(x, 0.0f))};
  }
}

// A whole chunk, straight from global memory. Addresses are one of the lane's and offsets known at compile time: 64-bit
// sums for every entry would take more registers than the entries.
template <class C>
VCPO_DEVICE void load_chunk(const typename C::T* row, std::int64_t chunk, int lane, float (&z)[C::kEntries]) {
  const typename C::T* own = row + C::index(chunk, lane, 0);
  if constexpr (C::aligned) {
    device::Vector raw[C::kVectors];
#pragma unroll
    for (int i = 0; i < C::kVectors; ++i) raw[i] = device::load16(own + C::entry_offset(i * C::kWidth));
#pragma unroll
    for (int i = 0; i < C::kVectors; ++i) unpack<typename C::T>(raw[i], z + i * C::kWidth);
  } else {
#pragma unroll
    for (int j = 0; j < C::kEntries; ++j) z[j] = entry_at(own, C::entry_offset(j));
  }
}

// The row's last chunk, which it fills in part; the rest is -inf.
template <class C>
VCPO_DEVICE void load_ragged_chunk(const typename C::T* row, std::int64_t vocabulary, std::int64_t chunk, int lane,
                                   float (&z)[C::kEntries]) {
  const typename C::T* own = row + C::index(chunk, lane, 0);
  const int end = C::offset_of(vocabulary, chunk, lane);
#pragma unroll
  for (int j = 0; j < C::kEntries; ++j) z[j] = C::entry_offset(j) < end ? entry_at(own, C::entry_offset(j)) : -INFINITY;
}

template <class C>
VCPO_DEVICE void store_chunk(typename C::T* row, std::int64_t chunk, int lane, const float (&d)[C::kEntries]) {
  typename C::T* own = row + C::index(chunk, lane, 0);
  if constexpr (C::aligned) {
#pragma unroll
    for (int i = 0; i < C::kVectors; ++i)
      device::store16(own + C::entry_offset(i * C::kWidth), pack<typename C::T>(d + i * C::kWidth));
  } else {
#pragma unroll
    for (int j = 0; j < C::kEntries; ++j) own[C::entry_offset(j)] = to_entry<typename C::T>(d[j]);
  }
}

template <class C>
VCPO_DEVICE void store_ragged_chunk(typename C::T* row, std::int64_t vocabulary, std::int64_t chunk, int lane,
                                    const float (&d)[C::kEntries]) {
  typename C::T* own = row + C::index(chunk, lane, 0);
  const int end = C::offset_of(vocabulary, chunk, lane);
#pragma unroll
  for (int j = 0; j < C::kEntries; ++j)
    if (C::entry_offset(j) < end) own[C::entry_offset(j)] = to_entry<typename C::T>(d[j]);
}

// Where logits row (o, i) is, of rows counted through.
struct Position {
  std::int64_t outer, inner;
};
VCPO_DEVICE Position position_of(const Rows& rows, std::int64_t row) { return {row / rows.inner, row % rows.inner}; }
template <class T>
VCPO_DEVICE const T* row_at(const Rows& rows, const Position& p) {
  return static_cast<const T*>(rows.data) + p.outer * rows.stride_outer + p.inner * rows.stride_inner;
}
template <class T>
VCPO_DEVICE T* output_at(const Output& out, const Position& p) {
  return static_cast<T*>(out.data) + p.outer * out.stride_outer + p.inner * out.stride_inner;
}

}  // namespace vcpo
