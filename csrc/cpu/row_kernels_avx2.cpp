// The row kernels on AVX2, FMA and F16C: vectors of 8 floats. Why a file of its own: row_kernels.inc.
#include "row_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace vcpo {
namespace {

struct Simd {
  using F = __m256;
  static constexpr bool kFused = true;  // fma rounds once
  static constexpr int kWidth = 8;

  struct Two {
    F a, b;
  };

  static void prefetch(const void* p) {
    __builtin_prefetch(static_cast<const char*>(p) + 2048);
  }  // see row_kernels_avx512.cpp
  static void stream_fence() { _mm_sfence(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static F min(F a, F b) { return _mm256_min_ps(a, b); }  // b where either is NaN
  static F sign_bits() { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0x80000000u))); }
  static F abs(F a) { return _mm256_andnot_ps(sign_bits(), a); }
  static F copysign(F a, F s) { return _mm256_or_ps(abs(a), _mm256_and_ps(sign_bits(), s)); }
  static F select_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float largest(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  // 2^t for t from floor_exponent, NaN for NaN. Adding 1.5 2^23 rounds t to an integer in the low mantissa bits, which
  // then goes into the exponent of 2^(t - n). At kMinExponent that gives exactly 0. Minimax on [-1/2, 1/2];
  // error 1.6e-7.
  static constexpr float kMinExponent = -127.0f;
  static F floor_exponent(F t) { return max(set1(kMinExponent), t); }
  // For a t that may be above 0 too. The exponent field would wrap: 2^512 were 1. 2^127 has a square that shows.
  static F held_exponent(F t) { return floor_exponent(min(set1(127.0f), t)); }
  static F exp2(F t) {
    const F magic = set1(12582912.0f), n = add(t, magic), f = sub(t, sub(n, magic));
    F p = set1(0x1.5bb994p-10f);
    p = fma(p, f, set1(0x1.3cea84p-7f));
    p = fma(p, f, set1(0x1.c6b754p-5f));
    p = fma(p, f, set1(0x1.ebf9bcp-3f));
    p = fma(p, f, set1(0x1.62e42ap-1f));
    p = fma(p, f, set1(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  }

  // 16 elements as two vectors; bf16 splits into even and odd elements, which store2 undoes.
  static Two load2(const float* p) { return {load(p), load(p + 8)}; }
  static Two load2(const BFloat16* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static Two load2(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1))};
  }

  template <bool kStream>
  static void put(void* p, __m256i x) {
    if constexpr (kStream) {
      _mm256_stream_si256(static_cast<__m256i*>(p), x);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(p), x);
    }
  }
  template <bool kStream>
  static void store2(float* p, F a, F b) {
    put<kStream>(p, _mm256_castps_si256(a));
    put<kStream>(p + 8, _mm256_castps_si256(b));
  }
  static __m256i rounded_bf16(F x) {  // to nearest even, in the upper halves
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  }
  template <bool kStream>
  static void store2(BFloat16* p, F a, F b) {
    const __m256i low = _mm256_srli_epi32(rounded_bf16(a), 16);
    put<kStream>(p, _mm256_blend_epi16(low, rounded_bf16(b), 0xAA));
  }
  template <bool kStream>
  static void store2(Float16* p, F a, F b) {
    const __m128i low = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT),
                  high = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
    put<kStream>(p, _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
  }
};

#include "row_kernels.inc"

}  // namespace

const RowKernels kRowKernelsAvx2 = kRowKernels;

}  // namespace vcpo

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
