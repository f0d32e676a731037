// The vectorised kernels of one row that every row op is made of.
//
//   bindings.cpp -> <op>.cpp (rows over threads) -> row_kernels_<isa>.cpp (one row, vectorised)
#pragma once

// What row_kernels.inc needs too: included inside a namespace and under a target, it can include nothing itself.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../common/row_gradient.h"
#include "../common/row_state.h"
#include "../common/rows.h"

namespace vcpo {

// One row, for each dtype (indexed by Dtype). `stream`: write around the cache.
using ForwardRow = RowSummary (*)(const void* row, std::int64_t vocabulary, std::int64_t target, const RowScale&);
// Of the row without `target`, which may be none of its entries (-1).
using StateRow = RowState<double> (*)(const void* row, std::int64_t vocabulary, std::int64_t target, const RowScale&);
using BackwardRow = void (*)(void* out, const void* row, std::int64_t vocabulary, const RowGradient&, const RowScale&,
                             bool stream);

// What a forward leaves for the gradient of its own row, so that no exponential is taken twice: 2^(u - reference) of
// every entry and the reference of every block, in an order that only the kernels of one instruction set know.
struct Kept {
  float* exponentials;
  double* references;
};
using KeepingForwardRow = RowSummary (*)(const void* row, std::int64_t vocabulary, std::int64_t target, const RowScale&,
                                         const Kept&);
// c d logp / d logits: a RowGradient without an entropy's part (k1 = 0), its target in sight and no statistic NaN.
using KeptBackwardRow = void (*)(void* out, const void* row, std::int64_t vocabulary, const RowGradient&,
                                 const RowScale&, const Kept&, bool stream);

struct RowKernels {
  ForwardRow forward[3];
  StateRow state[3];
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
