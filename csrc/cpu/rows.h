// Rows of logits, their tokens, and the vectorised kernels of one row that every row op is made of.
//
//   bindings.cpp -> <op>.cpp (rows over threads) -> token_stats_<isa>.cpp (one row, vectorised)
#pragma once

#include <cstdint>

#include "../common/row_state.h"
#include "dtypes.h"

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
  bool shift;  // the logits row (o, i) predicts token (o, i + 1); entry (o, 0) has no prediction
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

// d logits_v = p_v (k1 t_v + k0), t_v = log2 p_v = u_v - lse2; the target's entry apart (target_index -1: not in
// sight).
struct RowGradient {
  double lse2;
  float k0, k1, target;
  std::int64_t target_index;
};

// One row, for each dtype (indexed by Dtype). `stream`: write around the cache.
using ForwardRow = RowStatistics (*)(const void* row, std::int64_t vocabulary, std::int64_t target, const RowScale&);
using BackwardRow = void (*)(void* out, const void* row, std::int64_t vocabulary, const RowGradient&, const RowScale&,
                             bool stream);

// What a forward leaves for the gradient of its own row, so that no exponential is taken twice: 2^(u - ref) of every
// entry and the reference of every block, in an order that only the kernels of one instruction set know.
struct Kept {
  float* exponentials;
  double* references;
};
using KeepingForwardRow = RowStatistics (*)(const void* row, std::int64_t vocabulary, std::int64_t target,
                                            const RowScale&, const Kept&);
// c d logp / d logits: a RowGradient without an entropy's part (k1 = 0), its target in sight and no statistic NaN.
using KeptBackwardRow = void (*)(void* out, const void* row, std::int64_t vocabulary, const RowGradient&,
                                 const RowScale&, const Kept&, bool stream);

struct RowKernels {
  ForwardRow forward[3];
  BackwardRow backward[3];
  KeepingForwardRow keeping_forward[3];
  KeptBackwardRow kept_backward[3];
  std::int64_t block, kept_per_block;  // entries of a block of the row, and floats that are kept of it
};

extern const RowKernels kRowKernelsBaseline;
#if defined(__x86_64__)
extern const RowKernels kRowKernelsAvx2;
extern const RowKernels kRowKernelsAvx512;
#endif

}  // namespace vcpo
