// The portable variant of token_stats's row kernels, at the compiler's default instruction set.
#include "token_stats.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace vcpo {
namespace {

inline void stream_fence() {}

#include "simd_baseline.inc"
#include "token_stats_rows.inc"

}  // namespace

const RowKernels kRowKernelsBaseline = kRowKernels;

}  // namespace vcpo
