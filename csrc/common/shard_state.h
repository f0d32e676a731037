// What a rank sends of a row whose vocabulary it shares, as vcpo_kernels/rows/shard_states.py says. Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "row_state.h"
#include "rows.h"

namespace vcpo {

// The state of this shard's entries without the target, relative to a reference that is a logit (after the softcap) in
// fp32, and the target's raw logit; -inf where it is not in sight.
struct ShardState {
  float reference, sum_exp, sum_centred, sum_sq, target_logit;
};

// [5, tokens]: each of ShardState's numbers a token-sized array, as Tokens'.
struct ShardStatesOut {
  float* data;
  std::int64_t tokens;

  VCPO_HOST_DEVICE void write(std::int64_t at, const ShardState& s) const {
    data[at] = s.reference, data[at + tokens] = s.sum_exp, data[at + 2 * tokens] = s.sum_centred;
    data[at + 3 * tokens] = s.sum_sq, data[at + 4 * tokens] = s.target_logit;
  }
};

VCPO_HOST_DEVICE inline ShardState empty_shard_state() { return {-INFINITY, 0.0f, 0.0f, 0.0f, -INFINITY}; }

// From a state whose reference is u in base 2. The logit that it came from is found again, exactly but for what a fused
// multiply-add rounded off, so that the sums move by a binade at most.
VCPO_HOST_DEVICE inline ShardState shard_state(const RowState<double>& s, const RowScale& scale, float target_logit) {
  if (s.sum_exp == 0) {
    ShardState out = empty_shard_state();
    out.target_logit = target_logit;
    return out;
  }
  const double per_logit = scale.softcap ? scale.scale * static_cast<double>(scale.inv_softcap) : scale.scale;
  const float reference = static_cast<float>(s.reference / per_logit);
  const RowState<double> moved = rebased(s, static_cast<double>(reference) * per_logit);
  return {reference, static_cast<float>(moved.sum_exp), static_cast<float>(moved.sum_centred),
          static_cast<float>(moved.sum_sq), target_logit};
}

}  // namespace vcpo
