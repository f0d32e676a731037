#include "token_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "flush_denormals.h"
#include "huge_pages.h"
#include "isa.h"

namespace vcpo {
namespace {

const RowKernels& kernels() {
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

std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

RowScale row_scale(const Scaling& s) {
  const double cap = s.softcap > 0 ? s.softcap : 1.0;
  return {static_cast<float>(cap * kLog2e / s.temperature), s.softcap > 0 ? 1.0f / s.softcap : 0.0f, s.softcap > 0};
}

// Where logits row (o, i) finds its token, and whether that token counts.
struct Entry {
  std::int64_t at;
  bool live;
};

Entry entry_of(const Rows& rows, const Tokens& tokens, std::int64_t o, std::int64_t i) {
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

const char* row_at(const Rows& rows, std::int64_t o, std::int64_t i) {
  return static_cast<const char*>(rows.data) + (o * rows.stride_outer + i * rows.stride_inner) * bytes_of(rows.dtype);
}

float element(const void* row, Dtype dtype, std::int64_t v) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(row)[v]);
    case Dtype::kFloat16:
      return to_float(static_cast<const Float16*>(row)[v]);
    default:
      return static_cast<const float*>(row)[v];
  }
}

// log2 p_v needs lse to more digits than fp32 gives it where |lse| is large. u_y - logp has them, unless logp itself is
// large: the smaller of the two numbers was rounded less.
RowGradient row_gradient(const void* row, Dtype dtype, std::int64_t y, float logp, float entropy, float lse, float g,
                         float h, const Scaling& scaling, const RowScale& s) {
  RowGradient out;
  const double z = element(row, dtype, y);
  const double u = (s.softcap && z > -INFINITY ? std::tanh(z * s.inv_softcap) : z) * s.scale;
  out.lse2 = std::abs(lse) <= std::abs(logp) ? lse * kLog2e : u - logp * kLog2e;
  const double inv_t = 1.0 / scaling.temperature;
  out.k0 = static_cast<float>(-(g + static_cast<double>(h) * entropy) * inv_t);
  out.k1 = static_cast<float>(-h * kLn2 * inv_t);
  const double p = std::exp(static_cast<double>(logp));
  const double from_entropy = p > 0 ? h * p * (static_cast<double>(logp) + entropy) : 0.0;
  out.target = static_cast<float>((-g * std::expm1(static_cast<double>(logp)) - from_entropy) * inv_t);
  out.target_index = y;
  return out;
}

}  // namespace

void token_stats_forward(const Rows& rows, const Tokens& tokens, const Scaling& scaling, float* logp, float* entropy,
                         float* score_sqnorm, float* lse, int threads) {
  const ForwardRow forward = kernels().forward[static_cast<int>(rows.dtype)];
  const RowScale scale = row_scale(scaling);
  for_each_row(rows, threads, kSmallChunk, [&](std::int64_t o, std::int64_t i) {
    const Entry entry = entry_of(rows, tokens, o, i);
    RowStatistics stats{0.0f, 0.0f, 0.0f, 0.0f};
    if (entry.live) {
      const std::int64_t y = tokens.ids[entry.at];
      const bool known = y >= 0 && y < rows.vocabulary;
      stats = forward(row_at(rows, o, i), rows.vocabulary, known ? y : 0, scale);
      if (!known) stats.logp = stats.score_sqnorm = NAN;
    }
    logp[entry.at] = stats.logp;
    entropy[entry.at] = stats.entropy;
    score_sqnorm[entry.at] = stats.score_sqnorm;
    lse[entry.at] = stats.lse;
  });
}

void token_stats_backward(void* out, std::int64_t out_stride_outer, std::int64_t out_stride_inner, const Rows& rows,
                          const Tokens& tokens, const Scaling& scaling, const float* logp, const float* entropy,
                          const float* lse, const float* grad_logp, const float* grad_entropy, int threads) {
  const BackwardRow backward = kernels().backward[static_cast<int>(rows.dtype)];
  const RowScale scale = row_scale(scaling);
  const std::int64_t row_bytes = rows.vocabulary * bytes_of(rows.dtype);
  // A gradient too large to be in the cache when it is next read is written around it, since a cached store of a line
  // that is not there reads it first: a third of the traffic. Not so in place, nor in fresh memory, whose lines the
  // system has just zeroed in the cache; there, threads stay apart by whole huge pages, which both would zero
  // otherwise.
  constexpr std::int64_t kLarge = 8 << 20;
  const std::int64_t total_bytes = rows.outer * rows.inner * row_bytes;
  const bool dense = out_stride_inner == rows.vocabulary && out_stride_outer == rows.inner * rows.vocabulary;
  const bool large = out != rows.data && total_bytes >= kLarge;
  const bool fresh = large && dense && prepare_if_fresh(out, static_cast<std::size_t>(total_bytes));
  const bool stream = large && !fresh;
  const std::int64_t balanced = total_bytes / (8 * std::max(threads, 1));
  const std::int64_t chunk_bytes =
      fresh ? std::max(kSmallChunk, std::min<std::int64_t>(2 * kHugePage, balanced)) : kSmallChunk;
  for_each_row(rows, threads, chunk_bytes, [&](std::int64_t o, std::int64_t i) {
    const Entry entry = entry_of(rows, tokens, o, i);
    char* d = static_cast<char*>(out) + (o * out_stride_outer + i * out_stride_inner) * bytes_of(rows.dtype);
    const float g = entry.live && grad_logp != nullptr ? grad_logp[entry.at] : 0.0f;
    const float h = entry.live && grad_entropy != nullptr ? grad_entropy[entry.at] : 0.0f;
    if (g == 0.0f && h == 0.0f) {
      std::memset(d, 0, static_cast<std::size_t>(row_bytes));
      return;
    }
    const char* row = row_at(rows, o, i);
    const std::int64_t y = tokens.ids[entry.at];
    const bool known = y >= 0 && y < rows.vocabulary;
    RowGradient gradient = row_gradient(row, rows.dtype, known ? y : 0, logp[entry.at], entropy[entry.at],
                                        lse[entry.at], g, h, scaling, scale);
    if (!known) gradient.k0 = gradient.k1 = gradient.target = NAN;
    backward(d, row, rows.vocabulary, gradient, scale, stream);
  });
}

}  // namespace vcpo
