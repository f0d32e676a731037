// What the row ops share: rows spread over threads, each row's token, and the numbers its kernels need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "flush_denormals.h"
#include "huge_pages.h"
#include "isa.h"
#include "row_kernels.h"

namespace vcpo {

inline const RowKernels& kernels() {
#if defined(__x86_64__)
  switch (isa_chosen()) {
    case Isa::kAvx512:
      return kRowKernelsAvx512;
    case Isa::kAvx2:
      return kRowKernelsAvx2;
    default:
      break;
  }
#endif
  return kRowKernelsBaseline;
}

// Rows over threads, in chunks of consecutive rows. Dynamic, because masked rows cost nothing. A row's result never
// depends on the chunk it is in.
constexpr std::int64_t kSmallChunk = 64 << 10;  // bytes: narrow rows must not pay for the scheduling

template <class Work>
void for_each_row(const Rows& rows, int threads, std::int64_t chunk_bytes, const Work& work) {
  const std::int64_t count = rows.outer * rows.inner;
  const std::int64_t row_bytes = std::max<std::int64_t>(1, rows.vocabulary * bytes_of(rows.dtype));
  const std::int64_t chunk = std::max<std::int64_t>(1, chunk_bytes / row_bytes);
  const std::int64_t chunks = (count + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads) if (threads > 1 && chunks > 1)
  {
    const FlushDenormals guard;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t c = 0; c < chunks; ++c) {
      for (std::int64_t r = c * chunk; r < std::min(count, (c + 1) * chunk); ++r) {
        work(r / rows.inner, r % rows.inner);
      }
    }
  }
}

inline const char* row_at(const Rows& rows, std::int64_t o, std::int64_t i) {
  return static_cast<const char*>(rows.data) + (o * rows.stride_outer + i * rows.stride_inner) * bytes_of(rows.dtype);
}

inline float element(const void* row, Dtype dtype, std::int64_t v) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(row)[v]);
    case Dtype::kFloat16:
      return to_float(static_cast<const Float16*>(row)[v]);
    default:
      return static_cast<const float*>(row)[v];
  }
}

inline char* output_at(const Output& out, Dtype dtype, std::int64_t o, std::int64_t i) {
  return static_cast<char*>(out.data) + (o * out.stride_outer + i * out.stride_inner) * bytes_of(dtype);
}

// How a gradient of all rows is written. One too large to be in the cache when it is next read is written around it,
// since a cached store of a line that is not there reads it first: a third of the traffic. Not so in place, nor in
// fresh memory, whose lines the system has just zeroed in the cache; there, threads stay apart by whole huge pages,
// which both would zero otherwise.
struct WritePlan {
  bool stream;
  std::int64_t chunk_bytes;
};

inline WritePlan write_plan(const Output& out, const Rows& rows, int threads) {
  constexpr std::int64_t kLarge = 8 << 20;
  const std::int64_t total = rows.outer * rows.inner * rows.vocabulary * bytes_of(rows.dtype);
  const bool dense = out.stride_inner == rows.vocabulary && out.stride_outer == rows.inner * rows.vocabulary;
  const bool large = out.data != rows.data && total >= kLarge;
  const bool fresh = large && dense && prepare_if_fresh(out.data, static_cast<std::size_t>(total));
  const std::int64_t balanced = total / (8 * std::max(threads, 1));
  const std::int64_t chunk = fresh ? std::min<std::int64_t>(2 * kHugePage, balanced) : 0;
  return {large && !fresh, std::max(kSmallChunk, chunk)};
}

}  // namespace vcpo
