// The partial state of a softmax row, and the rule by which two disjoint pieces of one row are merged.
//
// Blocks of a row, thread blocks of a cluster and vocabulary shards of a tensor-parallel group are all merged by this
// rule. Host and device. Base 2: u_v = x_v log2(e), with x the softcapped logits over the temperature. The target y is
// left out of every sum, so that 1 - p_y is a sum of positive terms and never a difference (design: `score_sqnorm`).
#pragma once

#include <cmath>

#include "host_device.h"

namespace vcpo {

constexpr double kLn2 = 0.6931471805599453094;
constexpr double kLog2e = 1.4426950408889634074;

// Sums over a set of vocabulary entries without the target.
//   ref: the exponent they are taken relative to: some u_v of the set, at most a few binades below the largest; -inf:
//   empty set. sum: sum of 2^(u - ref).   dot: sum of 2^(u - ref) (u - ref).   sq: sum of 4^(u - ref).
// NaN and +inf logits make sum NaN or inf, and every statistic of the row NaN.
template <class Real>
struct RowState {
  Real ref, sum, dot, sq;
};

template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> empty_row_state() {
  return {-static_cast<Real>(INFINITY), 0, 0, 0};
}

// The state seen from another reference, `up` = new ref - old ref.
template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> shifted(const RowState<Real>& s, Real up) {
  if (up == 0 || s.sum == 0) return s;  // equal references (their difference may be inf - inf), or nothing to shift
  const Real factor = exp2(-up);
  return {s.ref + up, factor * s.sum, factor * (s.dot - up * s.sum), factor * factor * s.sq};
}

template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> merge(const RowState<Real>& a, const RowState<Real>& b) {
  const Real ref = a.ref > b.ref ? a.ref : b.ref;
  const RowState<Real> x = a.ref == ref ? a : shifted(a, ref - a.ref);
  const RowState<Real> y = b.ref == ref ? b : shifted(b, ref - b.ref);
  return {ref, x.sum + y.sum, x.dot + y.dot, x.sq + y.sq};
}

// The statistics of a row (natural units), from the state of all entries but the target and the target's own exponent.
struct RowStatistics {
  float logp, entropy, score_sqnorm, lse;
};

// target: u_y relative to rest.ref (relative to 0 where rest is empty), which keeps its precision where |u| is large.
template <class Real>
VCPO_HOST_DEVICE inline RowStatistics finish(const RowState<Real>& rest, Real target) {
  const bool alone = rest.sum == 0;  // V = 1, or every other entry is -inf
  const Real base = alone ? Real(0) : rest.ref;
  const bool target_leads = alone || !(target < 0);
  const Real up = target_leads ? target : Real(0);
  const RowState<Real> others = shifted(rest, up);
  const Real e_target = target_leads ? exp2(target - up) : exp2(target);  // exactly 1 (or NaN) where the target leads
  const Real total = others.sum + e_target;
  // log1p keeps logp's relative precision as p_y -> 1
  const Real log_total = target_leads ? log1p(others.sum) : log(total);
  const Real dot_target = e_target > 0 ? e_target * (target - up) : Real(0);
  const Real ln2 = static_cast<Real>(kLn2);
  const Real rest_share = others.sum / total;
  RowStatistics out;
  out.logp = static_cast<float>((target - up) * ln2 - log_total);
  out.entropy = static_cast<float>(log_total - ln2 * (others.dot + dot_target) / total);
  out.score_sqnorm = static_cast<float>(rest_share * rest_share + others.sq / (total * total));
  out.lse = static_cast<float>((base + up) * ln2 + log_total);
  return out;
}

}  // namespace vcpo
