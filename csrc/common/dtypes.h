// The dtypes of logits, as the bindings number them, with scalar conversions. Vector conversions are in
// cpu/row_kernels_*.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace vcpo {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

VCPO_HOST_DEVICE inline std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

VCPO_HOST_DEVICE inline std::uint32_t bits_of(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b;
}
VCPO_HOST_DEVICE inline float from_bits(std::uint32_t b) {
  float x;
  std::memcpy(&x, &b, sizeof x);
  return x;
}

VCPO_HOST_DEVICE inline float to_float(float x) { return x; }
VCPO_HOST_DEVICE inline float to_float(BFloat16 x) { return from_bits(static_cast<std::uint32_t>(x.bits) << 16); }
VCPO_HOST_DEVICE inline float to_float(Float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1Fu, mantissa = x.bits & 0x3FFu;
  if (exponent == 31) return from_bits(sign | 0x7F800000u | (mantissa << 13));
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return from_bits(bits_of(magnitude) | sign);
  }
  return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <class T>
VCPO_HOST_DEVICE T from_float(float x);
template <>
VCPO_HOST_DEVICE inline float from_float<float>(float x) {
  return x;
}
template <>
VCPO_HOST_DEVICE inline BFloat16 from_float<BFloat16>(float x) {  // round to nearest even
  const std::uint32_t b = bits_of(x);
  if ((b & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<std::uint16_t>((b >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16)};
}
template <>
VCPO_HOST_DEVICE inline Float16 from_float<Float16>(float x) {  // round to nearest even
  std::uint32_t b = bits_of(x);
  const std::uint32_t sign = (b >> 16) & 0x8000u;
  b &= 0x7FFFFFFFu;
  std::uint32_t half;
  if (b > 0x7F800000u) {
    half = 0x7E00u;
  } else if (b >= 0x477FF000u) {  // rounds to 65536 or beyond
    half = 0x7C00u;
  } else if (b < 0x38800000u) {  // subnormal: adding 0.5 leaves round(x 2^24) in the low mantissa bits
    half = bits_of(from_bits(b) + 0.5f) - 0x3F000000u;
  } else {
    half = (b - 0x38000000u + 0xFFFu + ((b >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(half | sign)};
}

// -inf in each dtype: what a row's tail is padded with, so that it contributes nothing.
template <class T>
VCPO_HOST_DEVICE T minus_infinity() {
  return from_float<T>(-__builtin_inff());
}

}  // namespace vcpo
