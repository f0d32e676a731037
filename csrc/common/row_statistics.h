// The statistics of rows: of one, as a kernel has them in registers, and of all, as they lie in memory. Host and
// device. A further statistic is a field of both.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace vcpo {

// In natural units; a row that is masked out has RowStatistics{}, all 0.
struct RowStatistics {
  float logp, entropy, score_sqnorm, lse;

  // For an id outside the vocabulary: NaN in whatever speaks of the token; the rest is the row's alone.
  VCPO_HOST_DEVICE void forget_token() { logp = score_sqnorm = NAN; }
};

// Where those of all rows go: token-sized arrays, as Tokens'.
struct StatisticsOut {
  float *logp, *entropy, *score_sqnorm, *lse;

  VCPO_HOST_DEVICE void write(std::int64_t at, const RowStatistics& s) const {
    logp[at] = s.logp, entropy[at] = s.entropy, score_sqnorm[at] = s.score_sqnorm, lse[at] = s.lse;
  }
};

}  // namespace vcpo
