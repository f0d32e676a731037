// The extension's kernels without Python, to run under AddressSanitizer and UndefinedBehaviorSanitizer: `make
// sanitize`.
//
// Every tensor ends at the edge of an unreadable page, once at its end and once at its beginning, since sanitizers do
// not see through vector intrinsics. Results are checked against plain loops in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "../../csrc/common/dtypes.h"
#include "../../csrc/common/row_state.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/row_ops.h"
#include "checks.h"
#include "sequences_test.h"

namespace {

template <class T>
void check_rows(std::int64_t vocabulary, typename Guarded<T>::Side side, float softcap, bool inplace, int threads) {
  constexpr std::int64_t kOuter = 2, kInner = 3, kRows = kOuter * kInner;
  using Side = typename Guarded<float>::Side;
  const Side s = static_cast<Side>(side);
  std::mt19937 random(static_cast<unsigned>(vocabulary) * 7u + static_cast<unsigned>(side));
  std::normal_distribution<float> normal(0.0f, 4.0f);
  Guarded<T> z(static_cast<std::size_t>(kRows * vocabulary), side), grad(z.size(), side);
  Guarded<std::int64_t> ids(kRows, static_cast<Guarded<std::int64_t>::Side>(side));
  Guarded<std::uint8_t> mask(kRows, static_cast<Guarded<std::uint8_t>::Side>(side));
  Guarded<float> logp(kRows, s), entropy(kRows, s), score(kRows, s), lse(kRows, s), g(kRows, s), h(kRows, s);
  for (std::size_t i = 0; i < z.size(); ++i) z[i] = vcpo::from_float<T>(normal(random));
  for (std::int64_t r = 0; r < kRows; ++r) {
    ids[r] = r == 0   ? 0
             : r == 1 ? vocabulary - 1
                      : static_cast<std::int64_t>(random() % static_cast<unsigned>(vocabulary));
    mask[r] = r != 3;
    g[r] = normal(random), h[r] = normal(random);
  }
  ids[3] = -100;
  for (std::int64_t v = 0; v < vocabulary; ++v) {  // row 4: nothing but the target and a fill
    if (v != ids[4]) z[static_cast<std::size_t>(4 * vocabulary + v)] = vcpo::from_float<T>(lowest<T>());
  }
  z[static_cast<std::size_t>(5 * vocabulary + (ids[5] + 1) % vocabulary)] = vcpo::from_float<T>(900.0f);  // lost_digits
  const std::vector<T> before(z.data(), z.data() + z.size());
  const vcpo::Rows rows{z.data(), dtype_of<T>(), kOuter, kInner, vocabulary, kInner * vocabulary, vocabulary};
  const vcpo::Tokens tokens{ids.data(), mask.data(), false};
  const vcpo::Scaling scaling{0.8f, softcap};
  vcpo::token_stats_forward(rows, tokens, scaling, {logp.data(), entropy.data(), score.data(), lse.data()},
                            vcpo::CpuPlace{threads});
  void* out = inplace ? static_cast<void*>(z.data()) : grad.data();
  vcpo::token_stats_backward({out, kInner * vocabulary, vocabulary}, rows, tokens, scaling,
                             {logp.data(), entropy.data(), lse.data(), g.data(), h.data(), nullptr},
                             vcpo::CpuPlace{threads});

  const double eps = sizeof(T) == 4 ? 0 : std::is_same_v<T, vcpo::BFloat16> ? 1.0 / 256 : 1.0 / 1024;
  for (std::int64_t r = 0; r < kRows; ++r) {
    const T* d = static_cast<const T*>(out) + r * vocabulary;
    if (!mask[r]) {
      CHECK(logp[r] == 0 && entropy[r] == 0 && score[r] == 0 && lse[r] == 0, "masked row %d", static_cast<int>(r));
      for (std::int64_t v = 0; v < vocabulary; ++v) CHECK(vcpo::to_float(d[v]) == 0, "masked gradient");
      continue;
    }
    std::vector<double> x, slope;
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      const double value = vcpo::to_float(before[static_cast<std::size_t>(r * vocabulary + v)]);
      const double tanh = softcap > 0 ? std::tanh(value / softcap) : 0;
      x.push_back((softcap > 0 ? softcap * tanh : value) / scaling.temperature);
      slope.push_back((1 - tanh * tanh) / scaling.temperature);
    }
    const std::size_t y = static_cast<std::size_t>(ids[r]);
    const Expected e = expected(x, y);
    CHECK(close(logp[r], e.logp, 2e-6), "logp %g, want %g", logp[r], e.logp);
    CHECK(close(entropy[r], e.entropy, 2e-6), "entropy %g, want %g", entropy[r], e.entropy);
    CHECK(close(score[r], e.score, 2e-6), "score %g, want %g", score[r], e.score);
    CHECK(close(lse[r], e.lse, 2e-6), "lse %g, want %g", lse[r], e.lse);
    for (std::size_t v = 0; v < x.size(); ++v) {
      const double entropy_part = e.p[v] > 0 ? e.p[v] * (x[v] - e.lse + e.entropy) : 0;
      const double want = (g[r] * ((v == y) - e.p[v]) - h[r] * entropy_part) * slope[v];
      const double got = vcpo::to_float(d[v]);
      CHECK(std::abs(got - want) <= eps * std::abs(want) + 1e-4, "gradient %g, want %g", got, want);
    }
  }
}

// score_rows writes what the backward would but for rounding, and the statistics of the forward to the bit; a backward
// by blocks of the vocabulary gives the whole row's gradient.
template <class T>
void check_scores_and_blocks(std::int64_t vocabulary, typename Guarded<T>::Side side, float softcap, bool inplace) {
  constexpr std::int64_t kRows = 5;
  using Side = typename Guarded<float>::Side;
  const Side s = static_cast<Side>(side);
  std::mt19937 random(static_cast<unsigned>(vocabulary) * 11u + static_cast<unsigned>(side));
  std::normal_distribution<float> normal(0.0f, 4.0f);
  Guarded<T> z(static_cast<std::size_t>(kRows * vocabulary), side), grad(z.size(), side), whole(z.size(), side);
  Guarded<std::int64_t> ids(kRows, static_cast<Guarded<std::int64_t>::Side>(side)),
      in_block(kRows, Guarded<std::int64_t>::kEnd);
  Guarded<std::uint8_t> mask(kRows, static_cast<Guarded<std::uint8_t>::Side>(side));
  Guarded<float> logp(kRows, s), entropy(kRows, s), score(kRows, s), lse(kRows, s), c(kRows, s), target(kRows, s);
  Guarded<float> logp2(kRows, s), entropy2(kRows, s), score2(kRows, s), lse2(kRows, s);
  for (std::size_t i = 0; i < z.size(); ++i) z[i] = vcpo::from_float<T>(normal(random));
  for (std::int64_t r = 0; r < kRows; ++r) {
    ids[r] = r == 0 ? vocabulary - 1 : static_cast<std::int64_t>(random() % static_cast<unsigned>(vocabulary));
    mask[r] = r != 2;
    c[r] = r == 3 ? 0.0f : normal(random);
    target[r] = vcpo::to_float(z[static_cast<std::size_t>(r * vocabulary + ids[r])]);
  }
  const vcpo::Rows rows{z.data(), dtype_of<T>(), 1, kRows, vocabulary, kRows * vocabulary, vocabulary};
  const vcpo::Tokens tokens{ids.data(), mask.data(), false};
  const vcpo::Scaling scaling{0.8f, softcap};
  const vcpo::CpuPlace place{2};
  vcpo::token_stats_forward(rows, tokens, scaling, {logp.data(), entropy.data(), score.data(), lse.data()}, place);
  vcpo::token_stats_backward({whole.data(), kRows * vocabulary, vocabulary}, rows, tokens, scaling,
                             {logp.data(), entropy.data(), lse.data(), c.data(), nullptr, nullptr}, place);
  for (const std::int64_t width : {vocabulary, vocabulary / 2 + 1}) {
    for (std::int64_t begin = 0; begin < vocabulary; begin += width) {
      const std::int64_t count = std::min(width, vocabulary - begin);
      Guarded<T> block(static_cast<std::size_t>(kRows * count), side);
      for (std::int64_t r = 0; r < kRows; ++r) {
        in_block[r] = ids[r] - begin;
        std::memcpy(block.data() + r * count, z.data() + r * vocabulary + begin,
                    static_cast<std::size_t>(count) * sizeof(T));
      }
      const vcpo::Rows part{block.data(), dtype_of<T>(), 1, kRows, count, kRows * count, count};
      vcpo::token_stats_backward({block.data(), kRows * count, count}, part, {in_block.data(), mask.data(), false},
                                 scaling, {logp.data(), entropy.data(), lse.data(), c.data(), nullptr, target.data()},
                                 place);
      for (std::int64_t r = 0; r < kRows; ++r) {
        const T *got = block.data() + r * count, *want = whole.data() + r * vocabulary + begin;
        CHECK(std::memcmp(got, want, static_cast<std::size_t>(count) * sizeof(T)) == 0, "block at %d",
              static_cast<int>(begin));
      }
    }
  }
  T* out = inplace ? z.data() : grad.data();
  vcpo::score_rows({out, kRows * vocabulary, vocabulary}, rows, tokens, scaling, c.data(),
                   {logp2.data(), entropy2.data(), score2.data(), lse2.data()}, place);
  // From the forward's exponentials, not from p: within one rounding of the output, and what p's own rounding costs.
  const double eps = sizeof(T) == 4 ? 0x1p-23 : dtype_of<T>() == vcpo::Dtype::kFloat16 ? 0x1p-10 : 0x1p-8;
  const double subnormal = dtype_of<T>() == vcpo::Dtype::kFloat16 ? 0x1p-24 : 0.0;
  for (std::int64_t i = 0; i < kRows * vocabulary; ++i) {
    const std::int64_t r = i / vocabulary;
    const double got = vcpo::to_float(out[i]), want = vcpo::to_float(whole[static_cast<std::size_t>(i)]);
    const bool idle = mask[r] == 0 || c[r] == 0.0f;
    const double bound = idle ? 0.0 : eps * std::abs(want) + 2e-6 * std::abs(c[r]) / 0.8 + subnormal;
    CHECK(std::abs(got - want) <= bound, "scores, V = %d: %g for %g", static_cast<int>(vocabulary), got, want);
  }
  for (std::int64_t r = 0; r < kRows; ++r) {
    const bool same = logp[r] == logp2[r] && entropy[r] == entropy2[r] && score[r] == score2[r] && lse[r] == lse2[r];
    CHECK(same, "statistics of row %d", static_cast<int>(r));
  }
}

// Merging pieces in any grouping gives the whole row's state (the rule that blocks, CTAs and shards share).
template <class Real>
void check_merge() {
  const std::vector<Real> u{3, -40, 7.5, -INFINITY, 7.25, 0, -2, 12, -INFINITY};
  vcpo::RowState<Real> whole = vcpo::empty_row_state<Real>(), pairs = vcpo::empty_row_state<Real>();
  auto single = [](Real v) {
    return v == -INFINITY ? vcpo::empty_row_state<Real>() : vcpo::RowState<Real>{v, 1, 0, 1};
  };
  for (Real v : u) whole = vcpo::merged(whole, single(v));
  for (std::size_t i = u.size(); i-- > 0;) pairs = vcpo::merged(single(u[i]), pairs);
  std::vector<double> x;
  for (Real v : u) x.push_back(static_cast<double>(v) * vcpo::kLn2);
  x.push_back(5 * vcpo::kLn2);
  const Expected e = expected(x, x.size() - 1);
  for (const auto& state : {whole, pairs}) {
    const vcpo::RowStatistics stats = vcpo::statistics_of<Real>(state, 5);
    CHECK(close(stats.logp, e.logp, 1e-6) && close(stats.entropy, e.entropy, 1e-6), "merged %g", stats.logp);
    CHECK(close(stats.score_sqnorm, e.score, 1e-6) && close(stats.lse, e.lse, 1e-6), "merged %g", stats.score_sqnorm);
  }
  const vcpo::RowStatistics alone = vcpo::statistics_of<Real>(vcpo::empty_row_state<Real>(), 4);
  CHECK(alone.logp == 0 && alone.entropy == 0 && alone.score_sqnorm == 0, "a row of one entry");
}

// Every float16, both ways; bfloat16 by its definition.
void check_dtypes() {
  for (std::uint32_t b = 0; b < 0x10000; ++b) {
    const vcpo::Float16 h{static_cast<std::uint16_t>(b)};
    const float x = vcpo::to_float(h);
    if (std::isnan(x)) continue;
    CHECK(vcpo::from_float<vcpo::Float16>(x).bits == h.bits, "float16 %x", b);
  }
  CHECK(vcpo::from_float<vcpo::Float16>(65520.0f).bits == 0x7C00, "float16 overflow");
  CHECK(vcpo::from_float<vcpo::Float16>(65519.0f).bits == 0x7BFF, "float16 largest");
  CHECK(vcpo::from_float<vcpo::BFloat16>(vcpo::from_bits(0x3F808000)).bits == 0x3F80, "bfloat16 tie to even");
  CHECK(vcpo::from_float<vcpo::BFloat16>(vcpo::from_bits(0x3F818000)).bits == 0x3F82, "bfloat16 tie to even");
  CHECK(std::isnan(vcpo::to_float(vcpo::from_float<vcpo::BFloat16>(NAN))), "bfloat16 NaN");
}

// A row in two shards, the first of which does not hold the target: their states' sums are the row's.
template <class T>
void check_shard_states(std::int64_t vocabulary, typename Guarded<T>::Side side, float softcap) {
  std::mt19937 random(static_cast<unsigned>(vocabulary));
  std::normal_distribution<float> normal(0.0f, 4.0f);
  const std::int64_t first = vocabulary / 2, y = vocabulary - 1;
  const vcpo::Scaling scaling{0.8f, softcap};
  double total = 0, want = 0;
  for (const auto& [begin, end] : {std::pair{std::int64_t{0}, first}, std::pair{first, vocabulary}}) {
    const std::int64_t width = end - begin;
    if (width == 0) continue;
    Guarded<T> z(static_cast<std::size_t>(width), side);
    for (std::int64_t v = 0; v < width; ++v) {
      z[static_cast<std::size_t>(v)] = vcpo::from_float<T>(normal(random));
      const double raw = vcpo::to_float(z[static_cast<std::size_t>(v)]);
      const double capped = softcap > 0 ? softcap * std::tanh(raw / softcap) : raw;
      if (begin + v != y) want += std::exp(capped / 0.8);
    }
    Guarded<float> states(5, static_cast<Guarded<float>::Side>(side));
    const std::int64_t id = y - begin;
    vcpo::token_states({z.data(), dtype_of<T>(), 1, 1, width, width, width}, {&id, nullptr, false}, scaling,
                       {states.data(), 1}, vcpo::CpuPlace{1});
    if (states[1] > 0) total += states[1] * std::exp(static_cast<double>(states[0]) / 0.8);
    CHECK(end == vocabulary ? states[4] == vcpo::to_float(z[static_cast<std::size_t>(id)]) : states[4] == -INFINITY,
          "target of a shard, vocabulary %lld", static_cast<long long>(vocabulary));
  }
  CHECK(std::abs(total - want) <= 5e-6 * want, "states of shards, vocabulary %lld: %g, want %g",
        static_cast<long long>(vocabulary), total, want);
}

template <class T>
void check_dtype_rows() {
  for (const std::int64_t vocabulary : {1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 100, 4095, 4096, 4097, 9001}) {
    for (const auto side : {Guarded<T>::kEnd, Guarded<T>::kBegin}) {
      for (const float softcap : {0.0f, 12.0f}) {
        check_shard_states<T>(vocabulary, side, softcap);
        for (const bool inplace : {false, true}) {
          check_rows<T>(vocabulary, side, softcap, inplace, 2);
          check_scores_and_blocks<T>(vocabulary, side, softcap, inplace);
        }
      }
    }
  }
  check_rows<T>(1 << 19, Guarded<T>::kEnd, 0.0f, false, 2);  // large enough for streaming stores
  check_rows<T>((1 << 20) + 3, Guarded<T>::kBegin, 0.0f, false, 1);
}

}  // namespace

int main() {
  check_dtypes();
  check_merge<float>();
  check_merge<double>();
  check_sequences();
  for (const vcpo::Isa isa : vcpo::isa_available()) {
    vcpo::isa_choose(vcpo::isa_name(isa));
    check_dtype_rows<float>();
    check_dtype_rows<vcpo::BFloat16>();
    check_dtype_rows<vcpo::Float16>();
    std::printf("%s checked\n", vcpo::isa_name(isa));
  }
  std::printf("%s\n", failures == 0 ? "all passed" : "FAILED");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
