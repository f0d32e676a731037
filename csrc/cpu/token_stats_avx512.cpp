// The avx512 variant of token_stats's row kernels. The target is set by pragma for this file's own code alone: the
// headers come first, and everything below is in an anonymous namespace.
#include "token_stats.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
// GCC's own avx512 headers start from a deliberately undefined vector, and warn of it once inlined (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace vcpo {
namespace {

inline void stream_fence() { _mm_sfence(); }

#include "simd_avx512.inc"
#include "token_stats_rows.inc"

}  // namespace

const RowKernels kRowKernelsAvx512 = kRowKernels;

}  // namespace vcpo

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
