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
//                -inf: empty set. In units of which `scale` make a binade: u itself where they are double (scale 1),
//                and where they are float the value, whose u = value * scale float may not hold
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

// The same sums relative to a reference that is `up` binades higher.
template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> raised(const RowState<Real>& s, Real reference, Real up) {
  constexpr Real kAllGone = 2000;  // 2^-2000 is 0, which an infinite `up` would make NaN
  if (!(up < kAllGone)) up = kAllGone;
  const Real factor = exp2(-up);
  return {reference, factor * s.sum_exp, factor * (s.sum_centred - up * s.sum_exp), factor * factor * s.sum_sq};
}

template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> rebased(const RowState<Real>& s, Real reference, Real scale = 1) {
  if (s.reference == reference || s.sum_exp == 0) return s;  // their difference may be inf - inf; or nothing to move
  return raised(s, reference, (reference - s.reference) * scale);
}

template <class Real>
VCPO_HOST_DEVICE inline RowState<Real> merged(const RowState<Real>& a, const RowState<Real>& b, Real scale = 1) {
  const Real reference = a.reference > b.reference ? a.reference : b.reference;
  const RowState<Real> x = rebased(a, reference, scale), y = rebased(b, reference, scale);
  return {reference, x.sum_exp + y.sum_exp, x.sum_centred + y.sum_centred, x.sum_sq + y.sum_sq};
}

// log2 of a sum of exponentials, as a sum: at u = 1e20 a double has no room for both.
struct Log2Sum {
  double leading, above;
};

// A row's statistics, and its lse in base 2 before it is rounded to fp32, which the row's own gradient is made of.
struct RowSummary : RowStatistics {
  Log2Sum lse2;
};

// Of a row, from the state of all entries but the target and the target's u. That is a double, as all that fp32 could
// overflow or round away: u of a logit of -3.4e38, its sum with log_total.
template <class Real>
VCPO_HOST_DEVICE inline RowSummary statistics_of(const RowState<Real>& rest, double u_target, double scale = 1) {
  const bool alone = rest.sum_exp == 0;  // V = 1, or every other entry is -inf
  const double base = alone ? 0.0 : rest.reference * scale, target = u_target - base;
  const bool target_leads = alone || !(target < 0);
  const double up = target_leads ? target : 0.0;
  const RowState<Real> others = alone ? rest : raised(rest, rest.reference, static_cast<Real>(up));
  const Real t = static_cast<Real>(target - up);  // exactly 0 (or NaN) where the target leads
  const Real e_target = exp2(t);
  const Real total = others.sum_exp + e_target;
  // log1p keeps logp's relative precision as p_y -> 1
  const Real log_total = target_leads ? log1p(others.sum_exp) : log(total);
  const Real centred_target = e_target > 0 ? e_target * t : Real(0);
  const Real ln2 = static_cast<Real>(kLn2);
  const Real rest_share = others.sum_exp / total;
  RowSummary out;
  out.logp = static_cast<float>((target - up) * kLn2 - log_total);
  out.entropy = static_cast<float>(log_total - ln2 * (others.sum_centred + centred_target) / total);
  out.score_sqnorm = static_cast<float>(rest_share * rest_share + others.sum_sq / (total * total));
  out.lse2 = {target_leads ? u_target : base, log_total * kLog2e};
  out.lse = static_cast<float>(out.lse2.leading * kLn2 + log_total);
  return out;
}

}  // namespace vcpo
