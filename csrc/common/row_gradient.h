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
struct RowGradient {
  double lse2;
  float k0, k1, target;
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

// z_y: the sampled token's logit. y: its index in the row, -1 where it is not in sight. log2 p_v needs lse to more
// digits than fp32 gives it where |lse| is large. u_y - logp has them, unless logp itself is large: the smaller of the
// two numbers was rounded less. A NaN logp makes the whole row NaN.
VCPO_HOST_DEVICE inline RowGradient row_gradient(double z_y, std::int64_t y, const TokenGradient& t,
                                                 const Scaling& scaling, const RowScale& s) {
  RowGradient out;
  const double u = (s.softcap && z_y > -INFINITY ? std::tanh(z_y * s.inv_softcap) : z_y) * s.scale;
  out.lse2 = std::abs(t.lse) <= std::abs(t.logp) ? t.lse * kLog2e : u - t.logp * kLog2e;
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
