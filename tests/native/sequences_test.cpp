// The sequence ops in guarded memory: offsets past the end, before the beginning, empty sequences, groups out of range.
// Python's tests hold their numbers (tests/sequences); here it is what they touch, and that threads change nothing.
#include "sequences_test.h"

#include <cstring>
#include <random>

#include "../../csrc/sequence_ops.h"
#include "checks.h"

namespace {

template <class T>
struct Batch {
  using Side = typename Guarded<T>::Side;
  static constexpr std::int64_t kSequences = 7;

  Batch(std::int64_t tokens, bool masked, bool ordered, Side side)
      : logp(n(tokens), side),
        behavior(n(tokens), side),
        scores(n(tokens), side),
        mask(n(tokens), Bytes(side)),
        offsets(n(kSequences + 1), Ints(side)),
        order(n(tokens), Ints(side)),
        ids(n(kSequences), Ints(side)),
        rewards(n(kSequences), side),
        segments{masked ? mask.data() : nullptr, offsets.data(), ordered ? order.data() : nullptr, kSequences, tokens} {
    std::mt19937 random(static_cast<unsigned>(tokens));
    std::normal_distribution<double> normal;
    for (std::int64_t t = 0; t < tokens; ++t) {
      logp[n(t)] = static_cast<T>(normal(random)), behavior[n(t)] = static_cast<T>(normal(random));
      scores[n(t)] = static_cast<T>(std::abs(normal(random)));
      mask[n(t)] = random() % 4 != 0;
      order[n(t)] = tokens - 1 - t;
    }
    // Empty ones, one that begins before the first token, one that ends past the last.
    const std::int64_t ends[] = {-3, 0, tokens / 3, tokens / 3, tokens / 2, tokens - 1, tokens, tokens + 9};
    for (std::int64_t i = 0; i <= kSequences; ++i) offsets[n(i)] = std::min(ends[i], tokens + 9);
    for (std::int64_t i = 0; i < kSequences; ++i) rewards[n(i)] = static_cast<T>(i % 3), ids[n(i)] = i - 1;
  }
  static std::size_t n(std::int64_t count) { return static_cast<std::size_t>(count); }
  static typename Guarded<std::uint8_t>::Side Bytes(Side s) { return static_cast<Guarded<std::uint8_t>::Side>(s); }
  static typename Guarded<std::int64_t>::Side Ints(Side s) { return static_cast<Guarded<std::int64_t>::Side>(s); }

  Guarded<T> logp, behavior, scores;
  Guarded<std::uint8_t> mask;
  Guarded<std::int64_t> offsets, order, ids;
  Guarded<T> rewards;
  vcpo::Segments segments;
};

template <class T>
void check_sums(Batch<T>& b, typename Guarded<T>::Side side, int threads) {
  const std::size_t tokens = b.logp.size();
  Guarded<T> sums(b.kSequences, side), spread(tokens, side);
  vcpo::segment_sum(sums.data(), b.logp.data(), b.segments, threads);
  vcpo::segment_spread(spread.data(), sums.data(), b.segments, threads);
  std::vector<double> want(b.kSequences, 0.0);
  std::vector<T> place(tokens, T(0));
  for (std::int64_t i = 0; i < b.kSequences; ++i) {
    for (std::int64_t k = b.offsets[b.n(i)]; k < b.offsets[b.n(i + 1)]; ++k) {
      if (k < 0 || k >= b.segments.tokens) continue;
      const auto at = b.n(b.segments.order == nullptr ? k : b.order[b.n(k)]);
      if (b.segments.mask != nullptr && b.mask[at] == 0) continue;
      want[b.n(i)] += b.logp[at];
      place[at] = sums[b.n(i)];
    }
  }
  for (std::int64_t i = 0; i < b.kSequences; ++i) {
    CHECK(static_cast<T>(want[b.n(i)]) == sums[b.n(i)], "sequence %d of %zu tokens", static_cast<int>(i), tokens);
  }
  CHECK(tokens == 0 || std::memcmp(place.data(), spread.data(), tokens * sizeof(T)) == 0, "spread %zu", tokens);
}

template <class T>
void check_coefficients(Batch<T>& b, typename Guarded<T>::Side side, std::int64_t groups, int threads) {
  const auto f64 = static_cast<Guarded<double>::Side>(side);
  Guarded<T> log_weights(b.kSequences, side), lengths(b.kSequences, side), advantages(b.kSequences, side);
  Guarded<T> coefficients(b.kSequences, side), baselines(b.n(std::max<std::int64_t>(groups, 1)), side);
  Guarded<T> metrics(vcpo::kMetrics, side);
  Guarded<double> moments(3, f64);
  const double none = std::nan("");
  for (int weighting = 0; weighting < 5; ++weighting) {
    for (int aggregation = 0; aggregation < 4; ++aggregation) {
      const vcpo::Switches switches{static_cast<vcpo::Weighting>(weighting),
                                    static_cast<vcpo::Aggregation>(aggregation),
                                    true,
                                    aggregation == 1,
                                    weighting == 3 ? none : 8.0,
                                    none,
                                    none,
                                    none,
                                    7.0};
      const vcpo::SequenceInputs<T> in{
          b.logp.data(), b.behavior.data(), b.scores.data(), nullptr, b.rewards.data(), b.ids.data(), 0, groups};
      const vcpo::SequenceOutputs<T> out{log_weights.data(), lengths.data(),      moments.data(), baselines.data(),
                                         advantages.data(),  coefficients.data(), metrics.data()};
      vcpo::vcpo_coefficients(in, out, b.segments, switches, threads);
      for (std::int64_t i = 0; i < b.kSequences; ++i) {
        const bool out_of_range = b.ids[b.n(i)] < 0 || b.ids[b.n(i)] >= groups;
        CHECK(!out_of_range || coefficients[b.n(i)] == 0, "group %d takes part", static_cast<int>(b.ids[b.n(i)]));
        CHECK(std::isfinite(coefficients[b.n(i)]), "coefficient %d", static_cast<int>(i));
      }
    }
  }
}

template <class T>
void check_dtype() {
  for (const std::int64_t tokens : {0, 1, 5, 40, 70000}) {
    for (const bool masked : {false, true}) {
      for (const bool ordered : {false, true}) {
        for (const auto side : {Guarded<T>::kEnd, Guarded<T>::kBegin}) {
          Batch<T> batch(tokens, masked, ordered, side);
          for (const int threads : {1, 2}) {
            check_sums(batch, side, threads);
            for (const std::int64_t groups : {0, 3, 7}) check_coefficients(batch, side, groups, threads);
          }
        }
      }
    }
  }
}

}  // namespace

void check_sequences() {
  check_dtype<float>();
  check_dtype<double>();
  std::printf("sequences checked\n");
}
