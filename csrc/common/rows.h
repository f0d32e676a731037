// What every kernel is told: the rows of logits, their tokens, where a gradient goes. Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "host_device.h"
#include "row_state.h"

namespace vcpo {

// logits [outer, inner, vocabulary], strides in elements, last dimension contiguous.
struct Rows {
  const void* data;
  Dtype dtype;
  std::int64_t outer, inner, vocabulary, stride_outer, stride_inner;
};

// Where a gradient goes: the shape and dtype of the rows it belongs to, own strides; may be the rows themselves.
struct Output {
  void* data;
  std::int64_t stride_outer, stride_inner;
};

// Token-sized arrays are [outer, inner] contiguous. mask may be null (all true).
struct Tokens {
  const std::int64_t* ids;
  const std::uint8_t* mask;
  bool shift;  // the logits row (o, i) predicts token (o, i + 1); token (o, 0) has no prediction
};

// x = softcap tanh(z / softcap) / temperature; softcap 0: none.
struct Scaling {
  float temperature, softcap;
};

// What a row kernel needs, worked out once per call. Base 2: u = value * scale, value = z or tanh(z * inv_softcap).
struct RowScale {
  float scale, inv_softcap;
  bool softcap;
};

VCPO_HOST_DEVICE inline RowScale row_scale(const Scaling& s) {
  const double cap = s.softcap > 0 ? s.softcap : 1.0;
  return {static_cast<float>(cap * kLog2e / s.temperature), s.softcap > 0 ? 1.0f / s.softcap : 0.0f, s.softcap > 0};
}

// Where logits row (o, i) finds its token in the token-sized arrays, and whether that token counts.
struct Token {
  std::int64_t at;
  bool valid;
};

VCPO_HOST_DEVICE inline Token token_of(const Rows& rows, const Tokens& tokens, std::int64_t o, std::int64_t i) {
  std::int64_t t = i;
  bool predicted = true;
  if (tokens.shift) {
    predicted = i + 1 < rows.inner;
    t = predicted ? i + 1 : 0;
  }
  const std::int64_t at = o * rows.inner + t;
  return {at, predicted && (tokens.mask == nullptr || tokens.mask[at] != 0)};
}

}  // namespace vcpo
