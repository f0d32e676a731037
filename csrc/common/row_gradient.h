// From a token's saved statistics to the two numbers that its row's gradient is made of. Host and device, in double: it
// is once a row.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "row_state.h"
#include "rows.h"

namespace vcpo {

// d logits_v = p_v (k1 t_v + k0), t_v = log2 p_v = u_v - lse2; the target's entry apart (target_index -1: not in
// sight).
//
// t_v = (value_v - reference) scale + offset, with a reference that is some float next to the row's largest value: its
// distance from an entry loses nothing where |u| is large, as u_v - lse2 would.
struct RowGradient {
  Log2Sum lse2;
  float reference, offset, k0, k1, target;
  std::int64_t target_index;
};

// A token's statistics as they were saved, and the gradients that arrive for them.
struct TokenGradient {
  float logp, entropy, lse, g, h;
};

// Those of all tokens, in arrays. grad_logp and grad_entropy may be null: 0. target_logits, where not null: the rows
// hold a block of their vocabulary, ids count from its first entry, one outside [0, vocabulary) lies in another block,
// and the sampled token's logit is given.
struct TokenGradients {
  const float *logp, *entropy, *lse, *grad_logp, *grad_entropy, *target_logits;

  // known: whether the token's id is one of the vocabulary, in the row or in another block of it.
  VCPO_HOST_DEVICE TokenGradient of(std::int64_t at, bool known, float g, float h) const {
    return {known ? logp[at] : NAN, entropy[at], lse[at], g, h};
  }
};

// lse in base 2, of what was saved. z_y: the sampled token's logit. log2 p_v needs lse to more digits than fp32 gives
// it where |lse| is large. u_y - logp has them, unless logp itself is large: the smaller of the two numbers was rounded
// less.
VCPO_HOST_DEVICE inline Log2Sum saved_lse2(double z_y, const TokenGradient& t, const RowScale& s) {
  const double u = (s.softcap && z_y > -INFINITY ? std::tanh(z_y * s.inv_softcap) : z_y) * s.scale;
  if (std::abs(t.lse) <= std::abs(t.logp)) return {t.lse * kLog2e, 0.0};
  return {u, -t.logp * kLog2e};
}

// Whether both are so large that p is good to 2e-6 no more, as where a temperature near 0 meets a token that is not the
// likeliest. A whole row's sums are then taken again; a block of one has nothing better.
VCPO_HOST_DEVICE inline bool lost_digits(const TokenGradient& t) {
  constexpr float kKept = 32.0f;                               // of which half an ulp is 1.9e-6
  return std::abs(t.lse) > kKept && std::abs(t.logp) > kKept;  // false for NaN
}

// y: the sampled token's index in the row, -1 where it is not in sight. A NaN logp makes the whole row NaN.
VCPO_HOST_DEVICE inline RowGradient row_gradient(Log2Sum lse2, std::int64_t y, const TokenGradient& t,
                                                 const Scaling& scaling, const RowScale& s) {
  RowGradient out;
  if (std::isnan(t.logp)) lse2.above = NAN;
  out.lse2 = lse2;
  out.reference = static_cast<float>((lse2.leading + lse2.above) / s.scale);
  out.offset = static_cast<float>(static_cast<double>(out.reference) * s.scale - lse2.leading - lse2.above);
  const double inv_t = 1.0 / scaling.temperature, g = t.g, h = t.h, logp = t.logp;
  out.k0 = static_cast<float>(-(g + h * t.entropy) * inv_t);
  out.k1 = static_cast<float>(-h * kLn2 * inv_t);
  const double p = std::exp(logp);
  const double from_entropy = p > 0 ? h * p * (logp + t.entropy) : 0.0;
  out.target = static_cast<float>((-g * std::expm1(logp) - from_entropy) * inv_t);
  out.target_index = y;
  return out;
}

}  // namespace vcpo
