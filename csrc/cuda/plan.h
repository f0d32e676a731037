// Which kernel serves a call, and with how much of what: plain arithmetic on sizes, tested on the host. Launch
// parameters are constants here, never tuned at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"

namespace vcpo {

// A block's warps; 16-byte vectors of a chunk that a lane has in registers at once; chunks of a warp's ring
// (row_streams.cuh).
struct StreamPlan {
  int warps, vectors, stages;
};
// 24 KB of rings a block, so that several are on a multiprocessor, out of step with each other.
constexpr StreamPlan kForward{4, 4, 3};
constexpr int kForwardBlocks = 6;  // blocks a multiprocessor that the register count must leave room for
// A map, of independent loads and stores.
constexpr StreamPlan kBackward{4, 2, 0};
constexpr int kBackwardBlocks = 8;
// score_rows without a cluster reads its row twice, and the second time is cheap where the L2 cache still has it: one
// block of 1024 threads a multiprocessor, so that 132 rows of 304 KB are 40 MB of an H100's 50 MB.
constexpr StreamPlan kScore{32, 2, 3};
// On a cluster: two blocks a multiprocessor, so that one computes while the other's row arrives.
constexpr StreamPlan kCluster{8, 4, 0};
constexpr int kClusterBlocks = 2;

enum class Path { kBulk, kAsync, kDirect };

struct Device {
  int ordinal;
  int capability;        // 10 * major + minor
  int shared_per_block;  // bytes, the most that a launch can ask for
};

inline bool is_aligned(const void* data, std::int64_t stride_outer, std::int64_t stride_inner, Dtype dtype) {
  const std::int64_t width = 16 / bytes_of(dtype);
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride_outer % width == 0 && stride_inner % width == 0;
}
inline bool is_aligned(const Rows& r) { return is_aligned(r.data, r.stride_outer, r.stride_inner, r.dtype); }
inline bool is_aligned(const Output& o, Dtype dtype) {
  return is_aligned(o.data, o.stride_outer, o.stride_inner, dtype);
}

inline Path stream_path(bool aligned, const Device& device) {
  if (!aligned) return Path::kDirect;
  return device.capability >= 90 ? Path::kBulk : Path::kAsync;
}

// blocks: of the cluster that holds a row; 0 where none can. capacity: whole chunks that a block has room for.
struct ClusterPlan {
  int blocks, capacity;
};

// The smallest cluster that leaves room for a second one on the same multiprocessors, else the largest, if the row
// fits.
inline ClusterPlan cluster_plan(std::int64_t whole_chunks, std::int64_t bytes_per_chunk, std::int64_t other_bytes,
                                const Device& device) {
  if (device.capability < 90) return {0, 0};
  constexpr int kLargest = 8;  // more is not portable
  // Of each multiprocessor's shared memory the system keeps 1 KB a block.
  const std::int64_t half = (device.shared_per_block + 1024) / kClusterBlocks - 1024;
  for (const std::int64_t room : {half, static_cast<std::int64_t>(device.shared_per_block)}) {
    for (int blocks = 1; blocks <= kLargest; blocks *= 2) {
      const std::int64_t capacity = (whole_chunks + blocks - 1) / blocks;
      if (capacity * bytes_per_chunk + other_bytes <= room) return {blocks, static_cast<int>(capacity)};
    }
  }
  return {0, 0};
}

}  // namespace vcpo
