// What the row ops share: rows spread over threads, each row's token, and the numbers its kernels need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "flush_denormals.h"
#include "huge_pages.h"
#include "isa.h"
#include "rows.h"

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

inline std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline RowScale row_scale(const Scaling& s) {
  const double cap = s.softcap > 0 ? s.softcap : 1.0;
  return {static_cast<float>(cap * kLog2e / s.temperature), s.softcap > 0 ? 1.0f / s.softcap : 0.0f, s.softcap > 0};
}

// Where logits row (o, i) finds its token, and whether that token counts.
struct Entry {
  std::int64_t at;
  bool live;
};

inline Entry entry_of(const Rows& rows, const Tokens& tokens, std::int64_t o, std::int64_t i) {
  std::int64_t t = i;
  bool predicted = true;
  if (tokens.shift) {
    predicted = i + 1 < rows.inner;
    t = predicted ? i + 1 : 0;
  }
  const std::int64_t at = o * rows.inner + t;
  return {at, predicted && (tokens.mask == nullptr || tokens.mask[at] != 0)};
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

// A token's statistics as they were saved, and the gradients that arrive for them.
struct TokenGradient {
  float logp, entropy, lse, g, h;
};

// z_y: the sampled token's logit. y: its index in the row, -1 where it is not in sight. log2 p_v needs lse to more
// digits than fp32 gives it where |lse| is large. u_y - logp has them, unless logp itself is large: the smaller of the
// two numbers was rounded less. A NaN logp makes the whole row NaN.
inline RowGradient row_gradient(double z_y, std::int64_t y, const TokenGradient& t, const Scaling& scaling,
                                const RowScale& s) {
  RowGradient out;
  const double u = (s.softcap && z_y > -INFINITY ? std::tanh(z_y * s.inv_softcap) : z_y) * s.scale;
  out.lse2 = std::abs(t.lse) <= std::abs(t.logp) ? t.lse * kLog2e : u - t.logp * kLog2e;
  const double inv_t = 1.0 / scaling.temperature, g = t.g, h = t.h, logp = t.logp;
  out.k0 = static_cast<float>(-(g + h * t.entropy) * inv_t);
  out.k1 = static_cast<float>(-h * kLn2 * inv_t);
  const double p = std::exp(logp);
  const double from_entropy = p > 0 ? h * p * (logp + t.entropy) : 0.0;
  out.target = static_cast<float>((-g * std::expm1(logp) - from_entropy) * inv_t);
  out.target_index = y;
  return out;
}

}  // namespace vcpo
