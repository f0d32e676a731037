// The ops between tokens [N] and sequences [B], on a CPU's threads, in float or double.
#pragma once

#include <cstdint>

namespace vcpo {

// Sequence i has positions order[offsets[i]] .. order[offsets[i + 1] - 1] (order null: the positions themselves), as
// far as they are below `tokens`, less those whose mask is 0 (null: none). Offsets [sequences + 1] do not fall.
struct Segments {
  const std::uint8_t* mask;
  const std::int64_t* offsets;
  const std::int64_t* order;
  std::int64_t sequences, tokens;
};

// out [sequences]: sums in double, rounded once.
template <class T>
void segment_sum(T* out, const T* values, const Segments& segments, int threads);

// out [tokens]: its sequence's value at each valid token, 0 elsewhere.
template <class T>
void segment_spread(T* out, const T* per_sequence, const Segments& segments, int threads);

enum class Weighting : int { kPaper, kEstimator, kOfficial, kMean, kLength };
enum class Aggregation : int { kSeqMeanTokenMean, kSeqMeanTokenSum, kSeqMeanTokenSumNorm, kTokenMean };

// VCPOConfig's. What is not given is NaN.
struct Switches {
  Weighting weighting;
  Aggregation aggregation;
  bool normalize_std, skip_first;
  double max_weight, ess_max_weight, num_sequences, num_tokens, max_tokens;
};

// Of tokens [N]: logp, behavior_logp, token_scores. Of sequences [B]: score_norms (null: sums of token_scores),
// rewards, group_ids (null: group_size consecutive sequences are a group).
template <class T>
struct SequenceInputs {
  const T *logp, *behavior_logp, *token_scores, *score_norms, *rewards;
  const std::int64_t* group_ids;
  std::int64_t group_size, num_groups;
};

// [B] but baselines [num_groups], moments [3], metrics [kMetrics].
template <class T>
struct SequenceOutputs {
  T *log_weights, *lengths;
  double* moments;
  T *baselines, *advantages, *coefficients, *metrics;
};
constexpr int kMetrics = 14;

template <class T>
void vcpo_coefficients(const SequenceInputs<T>& in, const SequenceOutputs<T>& out, const Segments& segments,
                       const Switches& switches, int threads);

}  // namespace vcpo
