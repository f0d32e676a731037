// The row kernels at the compiler's default instruction set: vectors of 4 floats in the compiler's own vector
// extension, which is SSE2 on x86-64, NEON on aarch64, anything elsewhere.
#include "row_kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace vcpo {
namespace {

struct Simd {
  typedef float F __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));
  typedef std::uint32_t U __attribute__((vector_size(16)));
  static constexpr bool kFused = false;  // fma may round twice
  static constexpr int kWidth = 4;

  struct Two {
    F a, b;
  };

  static void prefetch(const void* p) {
    __builtin_prefetch(static_cast<const char*>(p) + 2048);
  }  // see row_kernels_avx512.cpp
  static void stream_fence() {}  // nothing is streamed
  static F set1(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F blend(I where, F yes, F no) {
    return reinterpret_cast<F>((where & reinterpret_cast<I>(yes)) | (~where & reinterpret_cast<I>(no)));
  }
#if defined(__SSE2__)  // compilers do not see that the blends below are one instruction
  static F max(F a, F b) { return _mm_max_ps(a, b); }
  static F min(F a, F b) { return _mm_min_ps(a, b); }
#else
  static F max(F a, F b) { return blend(a > b, a, b); }  // b where either is NaN
  static F min(F a, F b) { return blend(a < b, a, b); }  // b where either is NaN
#endif
  static F abs(F a) { return reinterpret_cast<F>(reinterpret_cast<U>(a) & 0x7FFFFFFFu); }
  static F copysign(F a, F s) {
    return reinterpret_cast<F>((reinterpret_cast<U>(a) & 0x7FFFFFFFu) | (reinterpret_cast<U>(s) & 0x80000000u));
  }
  static F select_less(F a, F b, F yes, F no) { return blend(a < b, yes, no); }
  static float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static float largest(F a) {
    const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
    return x > y ? x : y;
  }

  // As in row_kernels_avx2.cpp.
  static constexpr float kMinExponent = -127.0f;
  static F floor_exponent(F t) { return max(set1(kMinExponent), t); }
  static F held_exponent(F t) { return floor_exponent(min(set1(127.0f), t)); }
  static F exp2(F t) {
    const F magic = set1(12582912.0f), n = t + magic, f = t - (n - magic);
    // Pairs first (Estrin): without fused operations Horner's ten steps in a row are all latency.
    const F f2 = f * f, low = set1(1.0f) + set1(0x1.62e42ap-1f) * f,
            middle = set1(0x1.ebf9bcp-3f) + set1(0x1.c6b754p-5f) * f;
    const F high = set1(0x1.3cea84p-7f) + set1(0x1.5bb994p-10f) * f;
    const F p = low + f2 * (middle + f2 * high);
    return reinterpret_cast<F>(reinterpret_cast<U>(p) + (reinterpret_cast<U>(n) << 23));
  }

  // 8 elements as two vectors; bf16 splits into even and odd elements (little endian), which store2 undoes.
  static Two load2(const float* p) { return {load(p), load(p + 4)}; }
  static Two load2(const BFloat16* p) {
    U x;
    std::memcpy(&x, p, sizeof x);
    return {reinterpret_cast<F>(x << 16), reinterpret_cast<F>(x & 0xFFFF0000u)};
  }
  static Two load2(const Float16* p) {
    return {F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])},
            F{to_float(p[4]), to_float(p[5]), to_float(p[6]), to_float(p[7])}};
  }

  template <bool kStream>
  static void store2(float* p, F a, F b) {
    store(p, a), store(p + 4, b);
  }
  static U rounded_bf16(F x) {  // to nearest even, in the upper halves
    const U bits = reinterpret_cast<U>(x);
    return bits + 0x7FFFu + ((bits >> 16) & 1u);
  }
  template <bool kStream>
  static void store2(BFloat16* p, F a, F b) {
    const U x = (rounded_bf16(a) >> 16) | (rounded_bf16(b) & 0xFFFF0000u);
    std::memcpy(p, &x, sizeof x);
  }
  template <bool kStream>
  static void store2(Float16* p, F a, F b) {
    for (int i = 0; i < 4; ++i) p[i] = from_float<Float16>(a[i]), p[i + 4] = from_float<Float16>(b[i]);
  }
};

#include "row_kernels.inc"

}  // namespace

const RowKernels kRowKernelsBaseline = kRowKernels;

}  // namespace vcpo
