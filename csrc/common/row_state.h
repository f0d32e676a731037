// The partial state of a softmax row, and the rule by which two disjoint pieces of one row are merged.
//
// Blocks of a row, thread blocks of a cluster and vocabulary shards of a tensor-parallel group are all merged by this
// rule. Host and device; its Triton twin, backends/triton/row_state.py, has the same names. Base 2: u_v = x_v log2(e),
// with x the softcapped logits over the temperature. The target y is left out of every sum, so that 1 - p_y is a sum of
// positive terms and never a difference (docs/design.md, "One pass").
#pragma once

#include <cmath>

#include "host_device.h"
#include "row_statistics.h"

namespace vcpo {

constexpr double kLn2 = 0.6931471805599453094;
constexpr double kLog2e = 1.4426950408889634074;

// Sums over a set of vocabulary entries without the target, with t_v = u_v - reference and e_v = 2^t_v.
//   reference    the exponent they are taken relative to: some u_v of the set, at most a few binades below the largest;
//                -inf: empty set
//   sum_exp      sum of e_v
//   sum_centred  sum of t_v e_v, the entropy's numerator in bits
//   sum_sq       sum of e_v^2, the score norm's numerator
// NaN and +inf logits make sum_exp NaN or inf, and every statistic of the row NaN.
template <class Real>
struct RowState {
  Real reference, sum_exp, sum_centred, sum_sq;
};

template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> empty_row_state() {
  return {-static_cast<Real>(INFINITY), 0, 0, 0};
}

// The state seen from another reference, `up` = new reference - old reference.
template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> rebased(const RowState<Real>& s, Real up) {
  if (up == 0 || s.sum_exp == 0) return s;  // equal references (their difference may be inf - inf), or nothing to move
  const Real factor = exp2(-up);
  return {s.reference + up, factor * s.sum_exp, factor * (s.sum_centred - up * s.sum_exp), factor * factor * s.sum_sq};
}

template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> merged(const RowState<Real>& a, const RowState<Real>& b) {
  const Real reference = a.reference > b.reference ? a.reference : b.reference;
  const RowState<Real> x = a.reference == reference ? a : rebased(a, reference - a.reference);
  const RowState<Real> y = b.reference == reference ? b : rebased(b, reference - b.reference);
  return {reference, x.sum_exp + y.sum_exp, x.sum_centred + y.sum_centred, x.sum_sq + y.sum_sq};
}

// The statistics of a row, from the state of all entries but the target and the target's own exponent. target: u_y
// relative to rest.reference (relative to 0 where rest is empty), which keeps its precision where |u| is large.
template <class Real>
VCPO_HOST_DEVICE inline RowStatistics statistics_of(const RowState<Real>& rest, Real target) {
  const bool alone = rest.sum_exp == 0;  // V = 1, or every other entry is -inf
  const Real base = alone ? Real(0) : rest.reference;
  const bool target_leads = alone || !(target < 0);
  const Real up = target_leads ? target : Real(0);
  const RowState<Real> others = rebased(rest, up);
  const Real e_target = target_leads ? exp2(target - up) : exp2(target);  // exactly 1 (or NaN) where the target leads
  const Real total = others.sum_exp + e_target;
  // log1p keeps logp's relative precision as p_y -> 1
  const Real log_total = target_leads ? log1p(others.sum_exp) : log(total);
  const Real centred_target = e_target > 0 ? e_target * (target - up) : Real(0);
  const Real ln2 = static_cast<Real>(kLn2);
  const Real rest_share = others.sum_exp / total;
  RowStatistics out;
  out.logp = static_cast<float>((target - up) * ln2 - log_total);
  out.entropy = static_cast<float>(log_total - ln2 * (others.sum_centred + centred_target) / total);
  out.score_sqnorm = static_cast<float>(rest_share * rest_share + others.sum_sq / (total * total));
  out.lse = static_cast<float>((base + up) * ln2 + log_total);
  return out;
}

}  // namespace vcpo
