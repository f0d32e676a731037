// The row kernels on AVX-512: vectors of 16 floats. Why a file of its own: row_kernels.inc.
#include "row_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

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

struct Simd {
  using F = __m512;
  static constexpr bool kFused = true;  // fma rounds once
  static constexpr int kWidth = 16;

  struct Two {
    F a, b;
  };

  // 2 KiB ahead: beyond what the hardware has in flight when each load starts 50 cycles of dependent arithmetic. On a
  // Cascade Lake core a row out of L3 took 36 us with and 50 without.
  static void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 2048); }
  static void stream_fence() { _mm_sfence(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F copysign(F a, F s) {
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(s), _mm512_castps_si512(a), 0xCA));
  }
  static F select_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }

  // 2^t for t from floor_exponent: 0 at kMinExponent, NaN for NaN. vreduceps takes the fraction and vscalefps the floor
  // of t, so that no integer arithmetic is left: 7 instructions. Minimax on [0, 1), 2^0 = 1 exactly; error 1.4e-7.
  static constexpr float kMinExponent = -200.0f;
  static F floor_exponent(F t) { return max(set1(kMinExponent), t); }
  static F held_exponent(F t) { return floor_exponent(t); }  // vscalefps makes inf of what is too large
  static F exp2(F t) {
    const F f = _mm512_reduce_ps(t, 0x09);
    F p = set1(0x1.e976b4p-10f);
    p = fma(p, f, set1(0x1.2777cep-7f));
    p = fma(p, f, set1(0x1.c91d04p-5f));
    p = fma(p, f, set1(0x1.ebdb54p-3f));
    p = fma(p, f, set1(0x1.62e4bap-1f));
    p = fma(p, f, set1(1.0f));
    return _mm512_scalef_ps(p, t);
  }

  // 32 elements as two vectors. bf16 splits into even and odd elements, one instruction each; sums do not mind the
  // order, and store2 undoes it.
  static Two load2(const float* p) { return {load(p), load(p + 16)}; }
  static Two load2(const BFloat16* p) {
    const __m512i x = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static Two load2(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
            _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1))};
  }

  template <bool kStream>
  static void put(void* p, __m512i x) {
    if constexpr (kStream) {
      _mm512_stream_si512(static_cast<__m512i*>(p), x);
    } else {
      _mm512_storeu_si512(p, x);
    }
  }
  template <bool kStream>
  static void store2(float* p, F a, F b) {
    put<kStream>(p, _mm512_castps_si512(a));
    put<kStream>(p + 16, _mm512_castps_si512(b));
  }
  static __m512i rounded_bf16(F x) {  // to nearest even, in the upper halves
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  }
  template <bool kStream>
  static void store2(BFloat16* p, F a, F b) {
    const __m512i low = _mm512_srli_epi32(rounded_bf16(a), 16);
    put<kStream>(p, _mm512_mask_blend_epi16(0xAAAAAAAAu, low, rounded_bf16(b)));
  }
  template <bool kStream>
  static void store2(Float16* p, F a, F b) {
    const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT),
                  high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
    put<kStream>(p, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
};

#include "row_kernels.inc"

}  // namespace

const RowKernels kRowKernelsAvx512 = kRowKernels;

}  // namespace vcpo

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
