// How a row reaches its threads, whole chunk by whole chunk: the three ways that a row kernel is instantiated with.
//
//   BulkStream    aligned rows from sm_90 on: each warp has a ring of chunks in shared memory that the bulk copy engine
//                 fills, one instruction of one lane for 2 KB. Warps never wait for each other.
//   AsyncStream   aligned rows before: the same ring, filled by 16-byte copies; a lane reads only what it copied
//   itself,
//                 so that nothing but its own copies is ever waited for.
//   DirectStream  other rows, as single entries, and what is read too rarely for a ring: through registers.
//
// Little's law asks an H100 for 3.35 TB/s x 0.7 us / 132 = 18 KB in flight on each multiprocessor. A ring of 3 chunks
// of 2 KB is 24 KB a block of 4 warps, 9 blocks fit. All of this is arithmetic, no GPU has measured it.
//
// A stream: start() first, then for_each(work), which calls work(chunk, z) for each of the warp's whole chunks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.cuh"
#include "row_chunks.cuh"

namespace vcpo {

// Which of a row's whole chunks are a warp's: first, first + step, ..., `count` of them.
struct Share {
  std::int64_t first, step, count;
  VCPO_DEVICE std::int64_t chunk(std::int64_t k) const { return first + k * step; }
};
VCPO_DEVICE Share share_of(std::int64_t begin, std::int64_t end, int warp, int warps) {
  const std::int64_t first = begin + warp;
  return {first, warps, end > first ? (end - first - 1) / warps + 1 : 0};
}

template <class C>
VCPO_DEVICE void unpack_chunk(const device::Vector (&raw)[C::kVectors], float (&z)[C::kEntries]) {
#pragma unroll
  for (int i = 0; i < C::kVectors; ++i) unpack<typename C::T>(raw[i], z + i * C::kWidth);
}

// One warp's chunk in shared memory, a lane's vectors of it.
template <class C>
VCPO_DEVICE void read_shared_chunk(const device::Vector* place, int lane, device::Vector (&raw)[C::kVectors]) {
#pragma unroll
  for (int i = 0; i < C::kVectors; ++i) raw[i] = place[i * kLanes + lane];
}

template <class T, int kWarps_, int kVectors, int kStages>
struct BulkStream {
  static constexpr bool kNeedsBulk = true;
  using C = Chunk<T, true, kVectors>;
  static constexpr int kWarps = kWarps_;
  static constexpr std::size_t kRingBytes = static_cast<std::size_t>(kWarps) * kStages * C::kBytes;
  static constexpr std::size_t kSharedBytes = kRingBytes + kWarps * kStages * sizeof(device::Barrier);

  const T* row;
  Share share;
  int lane;
  char* ring;
  device::Barrier* full;

  VCPO_DEVICE BulkStream(char* shared, const T* row_, std::int64_t whole, int warp, int lane_)
      : row(row_),
        share(share_of(0, whole, warp, kWarps)),
        lane(lane_),
        ring(shared + warp * kStages * C::kBytes),
        full(reinterpret_cast<device::Barrier*>(shared + kRingBytes) + warp * kStages) {}

  VCPO_DEVICE void copy(std::int64_t k) const {
    const int stage = static_cast<int>(k % kStages);
    device::copy_bulk(ring + stage * C::kBytes, row + share.chunk(k) * C::kSize, C::kBytes, full + stage);
  }
  VCPO_DEVICE void start() const {
    if (lane == 0) {
      for (int stage = 0; stage < kStages; ++stage) device::barrier_init(full + stage);
      device::barrier_init_done();
      for (int k = 0; k < kStages && k < share.count; ++k) copy(k);
    }
    device::warp_sync();
  }
  template <class Work>
  VCPO_DEVICE void for_each(const Work& work) const {
    int stage = 0;
    std::uint32_t parity = 0;
    for (std::int64_t k = 0; k < share.count; ++k) {
      device::barrier_wait(full + stage, parity);
      device::Vector raw[C::kVectors];
      read_shared_chunk<C>(reinterpret_cast<const device::Vector*>(ring + stage * C::kBytes), lane, raw);
      device::warp_sync();  // every lane has read before the next copy overwrites
      if (lane == 0 && k + kStages < share.count) copy(k + kStages);
      float z[C::kEntries];
      unpack_chunk<C>(raw, z);
      work(share.chunk(k), z);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      parity ^= stage == 0;
    }
  }
};

template <class T, int kWarps_, int kVectors, int kStages>
struct AsyncStream {
  static constexpr bool kNeedsBulk = false;
  using C = Chunk<T, true, kVectors>;
  static constexpr int kWarps = kWarps_;
  static constexpr std::size_t kSharedBytes = static_cast<std::size_t>(kWarps) * kStages * C::kBytes;

  const T* row;
  Share share;
  int lane;
  char* ring;

  VCPO_DEVICE AsyncStream(char* shared, const T* row_, std::int64_t whole, int warp, int lane_)
      : row(row_), share(share_of(0, whole, warp, kWarps)), lane(lane_), ring(shared + warp * kStages * C::kBytes) {}

  // One group a chunk, empty ones too, so that waiting for all but the last kStages - 1 groups is waiting for chunk k.
  VCPO_DEVICE void copy(std::int64_t k, int stage) const {
    if (k < share.count) {
      device::Vector* place = reinterpret_cast<device::Vector*>(ring + stage * C::kBytes) + lane;
      const T* own = row + C::index(share.chunk(k), lane, 0);
#pragma unroll
      for (int i = 0; i < C::kVectors; ++i)
        device::copy16_async(place + i * kLanes, own + C::entry_offset(i * C::kWidth));
    }
    device::copy_commit();
  }
  VCPO_DEVICE void start() const {
    for (int k = 0; k < kStages; ++k) copy(k, k);
  }
  template <class Work>
  VCPO_DEVICE void for_each(const Work& work) const {
    int stage = 0;
    for (std::int64_t k = 0; k < share.count; ++k) {
      device::copy_wait<kStages - 1>();
      device::Vector raw[C::kVectors];
      read_shared_chunk<C>(reinterpret_cast<const device::Vector*>(ring + stage * C::kBytes), lane, raw);
      copy(k + kStages, stage);
      float z[C::kEntries];
      unpack_chunk<C>(raw, z);
      work(share.chunk(k), z);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }
};

template <class T, int kWarps_, int kVectors, bool kAligned = false>
struct DirectStream {
  static constexpr bool kNeedsBulk = false;
  using C = Chunk<T, kAligned, kVectors>;
  static constexpr int kWarps = kWarps_;
  static constexpr std::size_t kSharedBytes = 0;

  const T* row;
  Share share;
  int lane;

  VCPO_DEVICE DirectStream(char*, const T* row_, std::int64_t whole, int warp, int lane_)
      : row(row_), share(share_of(0, whole, warp, kWarps)), lane(lane_) {}
  VCPO_DEVICE void start() const {}
  template <class Work>
  VCPO_DEVICE void for_each(const Work& work) const {
    for (std::int64_t k = 0; k < share.count; ++k) {
      float z[C::kEntries];
      load_chunk<C>(row, share.chunk(k), lane, z);
      work(share.chunk(k), z);
    }
  }
};

}  // namespace vcpo
