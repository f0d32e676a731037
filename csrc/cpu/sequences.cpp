// The sequence ops as vcpo_kernels/backends/reference has them, in one call each: at a few thousand tokens it is the
// calls that cost, not the arithmetic. Sums over tokens are taken in order, one thread a sequence, so that results do
// not depend on the threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../sequence_ops.h"

namespace vcpo {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kUntruncatedLimit = 80.0;     // as sequences/log_weights.py
constexpr double kStdFloor = 1e-8;             // a smaller deviation does not divide
constexpr std::int64_t kManyTokens = 1 << 15;  // below, threads cost more than they save

bool given(double value) { return !std::isnan(value); }

// work(position) for the valid tokens of sequence i, in order.
template <class Work>
void for_each_token(const Segments& s, std::int64_t i, bool skip_first, const Work& work) {
  const std::int64_t begin = std::clamp<std::int64_t>(s.offsets[i], 0, s.tokens);
  const std::int64_t end = std::clamp<std::int64_t>(s.offsets[i + 1], 0, s.tokens);
  for (std::int64_t k = begin + (skip_first ? 1 : 0); k < end; ++k) {
    const std::int64_t at = s.order == nullptr ? k : s.order[k];
    if (s.mask == nullptr || s.mask[at] != 0) work(at);
  }
}

template <class Work>
void for_each_sequence(const Segments& s, int threads, const Work& work) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && s.tokens >= kManyTokens)
  for (std::int64_t i = 0; i < s.sequences; ++i) work(i);
}

// What is known of each sequence, and what follows from it; a vector a column.
struct Sequences {
  explicit Sequences(std::int64_t count) {
    for (auto* column : {&log_w, &norms, &lengths, &ratio_abs, &ratio_negative, &ratio_count, &rewards, &big_l,
                         &clipped, &scale, &advantages}) {
      column->resize(static_cast<std::size_t>(count));
    }
    ids.resize(static_cast<std::size_t>(count));
    ok.resize(static_cast<std::size_t>(count));
  }
  std::vector<double> log_w, norms, lengths, ratio_abs, ratio_negative, ratio_count, rewards, big_l, clipped, scale,
      advantages;
  std::vector<std::int64_t> ids;
  std::vector<char> ok;
};

struct Groups {
  explicit Groups(std::int64_t count)
      : size(n(count)),
        mean(n(count)),
        peak(n(count), -kInfinity),
        total(n(count)),
        weighted(n(count)),
        std(n(count)),
        highest(n(count), -kInfinity),
        lowest(n(count), kInfinity) {}
  static std::size_t n(std::int64_t count) { return static_cast<std::size_t>(count); }
  bool equal(std::size_t g) const { return highest[g] <= lowest[g]; }
  double baseline(std::size_t g) const { return total[g] > 0 ? weighted[g] / total[g] : mean[g]; }
  std::vector<double> size, mean, peak, total, weighted, std, highest, lowest;
};

template <class T>
void take_sums(Sequences& s, const SequenceInputs<T>& in, const Segments& segments, bool skip_first, int threads) {
  for_each_sequence(segments, threads, [&](std::int64_t i) {
    double ratio_sum = 0, score_sum = 0, tokens = 0, magnitudes = 0, negative = 0, finite = 0;
    for_each_token(segments, i, skip_first, [&](std::int64_t at) {
      const T ratio = in.logp[at] - in.behavior_logp[at];
      ratio_sum += ratio;
      if (in.score_norms == nullptr) score_sum += in.token_scores[at];
      tokens += 1;
      if (std::isfinite(ratio)) {
        magnitudes += std::abs(ratio);
        negative += ratio < 0;
        finite += 1;
      }
    });
    const auto k = static_cast<std::size_t>(i);
    s.log_w[k] = static_cast<T>(ratio_sum);  // L_i as it is returned
    s.norms[k] = in.score_norms == nullptr ? static_cast<T>(score_sum) : in.score_norms[i];
    s.lengths[k] = tokens, s.ratio_abs[k] = magnitudes, s.ratio_negative[k] = negative, s.ratio_count[k] = finite;
    s.rewards[k] = in.rewards[i];
  });
}

double scale_of(Aggregation aggregation, double length, double sequences, double tokens, double max_tokens) {
  if (aggregation == Aggregation::kTokenMean) return 1 / std::max(tokens, 1.0);
  const double per_sequence = aggregation == Aggregation::kSeqMeanTokenMean      ? std::max(length, 1.0)
                              : aggregation == Aggregation::kSeqMeanTokenSumNorm ? max_tokens
                                                                                 : 1.0;
  return 1 / (std::max(sequences, 1.0) * per_sequence);
}

// Who takes part, and with what weight and scale.
void weigh(Sequences& s, const Switches& w) {
  double nonempty = 0, tokens = 0;
  for (const double length : s.lengths) nonempty += length > 0, tokens += length;
  const double sequences = given(w.num_sequences) ? w.num_sequences : nonempty;
  if (given(w.num_tokens)) tokens = w.num_tokens;
  const double max_tokens = given(w.max_tokens) && w.max_tokens != 0 ? w.max_tokens : 1.0;
  const double limit = given(w.max_weight) ? kInfinity : kUntruncatedLimit;
  const double cap = given(w.max_weight) ? std::log(w.max_weight) : kInfinity;
  for (std::size_t i = 0; i < s.ok.size(); ++i) {
    s.ok[i] = s.lengths[i] > 0 && s.log_w[i] < limit && std::isfinite(s.rewards[i]) && s.norms[i] >= 0 &&
              s.norms[i] < kInfinity;
    s.big_l[i] = s.ok[i] ? s.log_w[i] : -kInfinity;
    s.clipped[i] = std::min(s.big_l[i], cap);
    s.scale[i] = scale_of(w.aggregation, s.lengths[i], sequences, tokens, max_tokens);
  }
}

double log_a(const Sequences& s, std::size_t i, Weighting weighting) {
  switch (weighting) {
    case Weighting::kPaper:
      return 2 * s.big_l[i] + std::log(s.norms[i]);
    case Weighting::kEstimator:
      return 2 * (std::log(s.scale[i]) + s.clipped[i]) + std::log(s.norms[i]);
    case Weighting::kOfficial:
      return 2 * s.clipped[i] + 2 * s.big_l[i] + std::log(s.norms[i]);
    case Weighting::kLength:
      return std::log(s.lengths[i]);
    default:
      return 0;
  }
}

Groups take_groups(const Sequences& s, Weighting weighting, std::int64_t count) {
  Groups g(count);
  for (std::size_t i = 0; i < s.ok.size(); ++i) {
    if (!s.ok[i]) continue;
    const auto k = static_cast<std::size_t>(s.ids[i]);
    g.size[k] += 1, g.mean[k] += s.rewards[i];
    g.peak[k] = std::max(g.peak[k], log_a(s, i, weighting));
    g.highest[k] = std::max(g.highest[k], s.rewards[i]), g.lowest[k] = std::min(g.lowest[k], s.rewards[i]);
  }
  for (std::size_t k = 0; k < g.size.size(); ++k) g.mean[k] /= g.size[k];
  for (std::size_t i = 0; i < s.ok.size(); ++i) {
    if (!s.ok[i]) continue;
    const auto k = static_cast<std::size_t>(s.ids[i]);
    const double of = log_a(s, i, weighting), a = of > -kInfinity ? std::exp(of - g.peak[k]) : 0.0;
    g.total[k] += a, g.weighted[k] += a * s.rewards[i];
    g.std[k] += (s.rewards[i] - g.mean[k]) * (s.rewards[i] - g.mean[k]);
  }
  for (std::size_t k = 0; k < g.size.size(); ++k) g.std[k] = std::sqrt(g.std[k] / g.size[k]);
  return g;
}

double log_sum_exp(const std::vector<double>& logs, double factor) {
  double peak = -kInfinity, sum = 0;
  for (const double x : logs) peak = std::max(peak, factor * x);
  if (peak == -kInfinity) return peak;
  for (const double x : logs) sum += std::exp(factor * x - peak);
  return peak + std::log(sum);
}

// (log sum w, log sum w^2, B) of the weights that the step is scaled by.
void take_moments(double* moments, const Sequences& s, double ess_max_weight) {
  const double cap = given(ess_max_weight) ? std::log(ess_max_weight) : kInfinity;
  std::vector<double> logs(s.ok.size());
  double count = 0;
  for (std::size_t i = 0; i < logs.size(); ++i) {
    logs[i] = s.ok[i] ? std::min(s.log_w[i], cap) : -kInfinity;
    count += s.lengths[i] > 0;
  }
  moments[0] = log_sum_exp(logs, 1), moments[1] = log_sum_exp(logs, 2), moments[2] = count;
}

// In the order of METRICS (sequences/vcpo_coefficients.py).
template <class T>
void write_metrics(T* out, const Sequences& s, const Groups& g, const double* moments) {
  double taking_part = 0, truncated = 0, sum_l = 0, highest = -kInfinity, sum_r = 0, sum_a = 0;
  double sequences = 0, tokens = 0, dropped = 0, magnitudes = 0, negative = 0, finite = 0;
  for (std::size_t i = 0; i < s.ok.size(); ++i) {
    sequences += s.lengths[i] > 0, tokens += s.lengths[i];
    dropped += s.lengths[i] > 0 && !s.ok[i];
    magnitudes += s.ratio_abs[i], negative += s.ratio_negative[i], finite += s.ratio_count[i];
    sum_a += s.advantages[i] * s.advantages[i];
    if (!s.ok[i]) continue;
    taking_part += 1, truncated += s.big_l[i] > s.clipped[i], sum_l += s.big_l[i], sum_r += s.rewards[i];
    highest = std::max(highest, s.big_l[i]);
  }
  double seen = 0, equal = 0, single = 0;
  for (std::size_t k = 0; k < g.size.size(); ++k) {
    seen += g.size[k] > 0, equal += g.size[k] > 0 && g.equal(k), single += g.size[k] == 1;
  }
  const double ess = moments[0] > -kInfinity ? std::min(std::exp(2 * moments[0] - moments[1]), moments[2]) : 0.0;
  const double of = std::max(taking_part, 1.0), ratios = std::max(finite, 1.0);
  const double metrics[kMetrics] = {ess,
                                    moments[2] > 0 ? ess / moments[2] : 0.0,
                                    sequences,
                                    tokens,
                                    dropped,
                                    truncated / of,
                                    sum_l / of,
                                    taking_part > 0 ? highest : 0.0,
                                    sum_r / of,
                                    sum_a / of,
                                    equal / std::max(seen, 1.0),
                                    single,
                                    magnitudes / ratios,
                                    negative / ratios};
  for (int m = 0; m < kMetrics; ++m) out[m] = static_cast<T>(metrics[m]);
}

}  // namespace

template <class T>
void segment_sum(T* out, const T* values, const Segments& segments, int threads) {
  for_each_sequence(segments, threads, [&](std::int64_t i) {
    double sum = 0;
    for_each_token(segments, i, false, [&](std::int64_t at) { sum += values[at]; });
    out[i] = static_cast<T>(sum);
  });
}

template <class T>
void segment_spread(T* out, const T* per_sequence, const Segments& segments, int threads) {
  std::fill(out, out + segments.tokens, T(0));
  for_each_sequence(segments, threads, [&](std::int64_t i) {
    for_each_token(segments, i, false, [&](std::int64_t at) { out[at] = per_sequence[i]; });
  });
}

template <class T>
void vcpo_coefficients(const SequenceInputs<T>& in, const SequenceOutputs<T>& out, const Segments& segments,
                       const Switches& switches, int threads) {
  Sequences s(segments.sequences);
  take_sums(s, in, segments, switches.skip_first && segments.order == nullptr, threads);
  weigh(s, switches);
  for (std::int64_t i = 0; i < segments.sequences; ++i) {
    const auto k = static_cast<std::size_t>(i);
    s.ids[k] = in.group_ids == nullptr ? i / std::max<std::int64_t>(in.group_size, 1) : in.group_ids[i];
    s.ok[k] = s.ok[k] && s.ids[k] >= 0 && s.ids[k] < in.num_groups;
  }
  take_moments(out.moments, s, switches.ess_max_weight);
  const Groups groups = take_groups(s, switches.weighting, in.num_groups);
  for (std::int64_t g = 0; g < in.num_groups; ++g) out.baselines[g] = static_cast<T>(groups.baseline(Groups::n(g)));
  for (std::int64_t i = 0; i < segments.sequences; ++i) {
    const auto k = static_cast<std::size_t>(i);
    double advantage = 0;
    if (s.ok[k] && !groups.equal(Groups::n(s.ids[k]))) {
      const auto g = Groups::n(s.ids[k]);
      advantage = s.rewards[k] - groups.baseline(g);
      if (switches.normalize_std && groups.std[g] > kStdFloor) advantage /= groups.std[g];
    }
    s.advantages[k] = advantage;
    out.log_weights[i] = static_cast<T>(s.log_w[k]), out.lengths[i] = static_cast<T>(s.lengths[k]);
    out.advantages[i] = static_cast<T>(advantage);
    out.coefficients[i] = advantage != 0 ? static_cast<T>(s.scale[k] * std::exp(s.clipped[k]) * advantage) : T(0);
  }
  write_metrics(out.metrics, s, groups, out.moments);
}

template void segment_sum(float*, const float*, const Segments&, int);
template void segment_sum(double*, const double*, const Segments&, int);
template void segment_spread(float*, const float*, const Segments&, int);
template void segment_spread(double*, const double*, const Segments&, int);
template void vcpo_coefficients(const SequenceInputs<float>&, const SequenceOutputs<float>&, const Segments&,
                                const Switches&, int);
template void vcpo_coefficients(const SequenceInputs<double>&, const SequenceOutputs<double>&, const Segments&,
                                const Switches&, int);

}  // namespace vcpo
