// What the host's tests of the CUDA kernels share: a batch of rows, checked against loops in double, and the kernels
// run on csrc/cuda/device_on_host.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/plan.h"
#include "../../csrc/cuda/token_stats.cuh"
#include "checks.h"

using vcpo::device::Launch;

// A batch of rows in guarded memory: the first and last token, masked tokens, an unknown id, rows without coefficients.
template <class T>
struct Batch {
  static constexpr std::int64_t kOuter = 2, kInner = 4, kCount = kOuter * kInner;
  using TokenSide = typename Guarded<float>::Side;

  std::int64_t vocabulary, stride;
  vcpo::Scaling scaling;
  Guarded<T> z, grad;
  Guarded<std::int64_t> ids;
  Guarded<std::uint8_t> mask;
  Guarded<float> logp, entropy, score, lse, g, h, target;
  std::vector<T> before;

  Batch(std::int64_t vocabulary_, std::int64_t stride_, typename Guarded<T>::Side side, float softcap)
      : vocabulary(vocabulary_),
        stride(stride_),
        scaling{0.8f, softcap},
        z(static_cast<std::size_t>((kCount - 1) * stride_ + vocabulary_), side),
        grad(z.size(), side),
        ids(kCount, Guarded<std::int64_t>::kEnd),
        mask(kCount, Guarded<std::uint8_t>::kEnd),
        logp(kCount, TokenSide::kEnd),
        entropy(kCount, TokenSide::kEnd),
        score(kCount, TokenSide::kEnd),
        lse(kCount, TokenSide::kEnd),
        g(kCount, TokenSide::kEnd),
        h(kCount, TokenSide::kEnd),
        target(kCount, TokenSide::kEnd) {
    std::mt19937 random(static_cast<unsigned>(vocabulary));
    std::normal_distribution<float> normal(0.0f, 4.0f);
    for (std::size_t i = 0; i < z.size(); ++i) {
      z[i] = vcpo::from_float<T>(normal(random));
      grad[i] = vcpo::from_float<T>(NAN);  // an entry that nobody writes stays NaN
    }
    for (std::int64_t r = 0; r < kCount; ++r) {
      const std::size_t i = static_cast<std::size_t>(r);
      ids[i] = r == 0 ? 0 : r == 1 ? vocabulary - 1 : static_cast<std::int64_t>(random() % vocabulary);
      mask[i] = r != 3;
      g[i] = r == 6 ? 0.0f : normal(random), h[i] = r == 6 ? 0.0f : normal(random);
      target[i] = vcpo::to_float(row(r)[ids[i]]);
    }
    ids[3] = -100, ids[5] = vocabulary;
    // row 1: one choice and a fill; 2: hidden vocabulary; 4: one peak; 7: a peak elsewhere (lost_digits); masked 3: NaN
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      if (v != ids[1]) row(1)[v] = vcpo::from_float<T>(lowest<T>());
      if (v % 2 == 0 && v != ids[2]) row(2)[v] = vcpo::from_float<T>(-INFINITY);
      row(3)[v] = vcpo::from_float<T>(NAN);
    }
    row(4)[ids[4]] = vcpo::from_float<T>(40.0f);
    row(7)[(ids[7] + 1) % vocabulary] = vcpo::from_float<T>(900.0f);
    before.assign(z.data(), z.data() + z.size());
  }

  T* row(std::int64_t r) { return z.data() + r * stride; }
  vcpo::Rows rows() {
    const vcpo::Dtype dtype = dtype_of<T>();
    return {z.data(), dtype, kOuter, kInner, vocabulary, kInner * stride, stride};
  }
  vcpo::Output output(bool inplace) { return {inplace ? z.data() : grad.data(), kInner * stride, stride}; }
  vcpo::Tokens tokens() { return {ids.data(), mask.data(), false}; }
  vcpo::RowScale scale() const { return vcpo::row_scale(scaling); }
  vcpo::StatisticsOut statistics() { return {logp.data(), entropy.data(), score.data(), lse.data()}; }

  std::vector<double> x(std::int64_t r) const {
    std::vector<double> values;
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      const double value = vcpo::to_float(before[static_cast<std::size_t>(r * stride + v)]), cap = scaling.softcap;
      values.push_back((cap > 0 && value > -INFINITY ? cap * std::tanh(value / cap) : value) / scaling.temperature);
    }
    return values;
  }

  void check_statistics(const char* what) {
    for (std::int64_t r = 0; r < kCount; ++r) {
      const std::size_t i = static_cast<std::size_t>(r);
      if (r == 3) {
        CHECK(logp[i] == 0 && entropy[i] == 0 && score[i] == 0 && lse[i] == 0, "%s: masked row", what);
        continue;
      }
      const bool unknown = r == 5;
      const Expected e = expected(x(r), unknown ? 0 : static_cast<std::size_t>(ids[i]));
      CHECK(close(lse[i], e.lse, 2e-6), "%s V=%d row %d: lse %g, want %g", what, int(vocabulary), int(r), lse[i],
            e.lse);
      CHECK(close(entropy[i], e.entropy, 2e-6), "%s V=%d row %d: entropy %g, want %g", what, int(vocabulary), int(r),
            entropy[i], e.entropy);
      if (unknown) {
        CHECK(std::isnan(logp[i]) && std::isnan(score[i]), "%s: an id outside the vocabulary", what);
        continue;
      }
      CHECK(close(logp[i], e.logp, 2e-6), "%s V=%d row %d: logp %g, want %g", what, int(vocabulary), int(r), logp[i],
            e.logp);
      CHECK(std::abs(score[i] - e.score) <= 1e-3 * e.score + 1e-30 && close(score[i], e.score, 2e-6),
            "%s V=%d row %d: score %g, want %g", what, int(vocabulary), int(r), score[i], e.score);
    }
  }

  // d (g logp + h entropy) / d logits; has_h: whether entropy took part.
  void check_gradient(const char* what, bool inplace, bool has_h) {
    // One rounding of the output, and 3e-6 of the coefficients, which is half an ulp of an lse of 40.
    const double eps = sizeof(T) == 4 ? 1.2e-7 : std::is_same_v<T, vcpo::BFloat16> ? 1.0 / 256 : 1.0 / 1024;
    for (std::int64_t r = 0; r < kCount; ++r) {
      const std::size_t i = static_cast<std::size_t>(r);
      const double size = 3e-6 * (std::abs(g[i]) + std::abs(h[i]));
      const T* d = (inplace ? z.data() : grad.data()) + r * stride;
      const bool zero = r == 3 || r == 6, unknown = r == 5;
      const std::size_t y = unknown ? 0 : zero ? 0 : static_cast<std::size_t>(ids[i]);
      const std::vector<double> values = x(r);
      const Expected e = zero ? Expected{} : expected(values, y);
      for (std::size_t v = 0; v < values.size(); ++v) {
        const double got = vcpo::to_float(d[v]);
        if (zero) {
          CHECK(got == 0, "%s V=%d row %d: %g, want 0", what, int(vocabulary), int(r), got);
          continue;
        }
        if (unknown) {
          CHECK(std::isnan(got), "%s: an id outside the vocabulary", what);
          continue;
        }
        const double value = vcpo::to_float(before[static_cast<std::size_t>(r * stride) + v]);
        const double tanh = scaling.softcap > 0 ? std::tanh(value / scaling.softcap) : 0;
        const double slope = (1 - tanh * tanh) / scaling.temperature;
        const double from_entropy = e.p[v] > 0 ? e.p[v] * (values[v] - e.lse + e.entropy) : 0;
        const double want = (g[i] * ((v == y) - e.p[v]) - (has_h ? h[i] * from_entropy : 0.0)) * slope;
        CHECK(std::abs(got - want) <= eps * std::abs(want) + size, "%s V=%d row %d v=%d: %g, want %g", what,
              int(vocabulary), int(r), int(v), got, want);
      }
    }
  }
};

template <class Stream>
std::size_t shared_of() {
  return Stream::kSharedBytes + Stream::kWarps * sizeof(vcpo::RowState<float>) + sizeof(vcpo::RowGradient);
}

inline std::size_t backward_shared(int warps) {
  return sizeof(vcpo::RowGradient) + static_cast<std::size_t>(warps) * sizeof(vcpo::RowState<float>);
}

// out: StatisticsOut or ShardStatesOut.
template <class Stream, class Out>
void run_forward(const vcpo::Rows& rows, const vcpo::Tokens& tokens, const vcpo::RowScale& scale, const Out& out,
                 Launch::Order order) {
  const Launch launch{rows.outer * rows.inner, Stream::kWarps * vcpo::kLanes, 1, shared_of<Stream>(), order};
  vcpo::device::run(launch, [&] {
    const auto kernel = scale.softcap ? vcpo::token_stats_forward_kernel<Stream, true, 1, Out>
                                      : vcpo::token_stats_forward_kernel<Stream, false, 1, Out>;
    kernel(rows, tokens, scale, out);
  });
}

template <class Stream>
void run_forward(Batch<typename Stream::C::T>& b, Launch::Order order) {
  run_forward<Stream>(b.rows(), b.tokens(), b.scale(), b.statistics(), order);
}

template <class C, bool kSoftcap>
void run_backward(const vcpo::Output& out, const vcpo::Rows& rows, const vcpo::Tokens& tokens,
                  const vcpo::Scaling& scaling, const vcpo::TokenGradients& gradients, Launch::Order order) {
  constexpr int kWarps = vcpo::kBackward.warps;
  const Launch launch{rows.outer * rows.inner, kWarps * vcpo::kLanes, 1, backward_shared(kWarps), order};
  vcpo::device::run(launch, [&] {
    const auto kernel = gradients.grad_entropy != nullptr
                            ? vcpo::token_stats_backward_kernel<C, kWarps, kSoftcap, true, 1>
                            : vcpo::token_stats_backward_kernel<C, kWarps, kSoftcap, false, 1>;
    kernel(out, rows, tokens, scaling, vcpo::row_scale(scaling), gradients);
  });
}

template <class C, bool kSoftcap>
void run_backward(Batch<typename C::T>& b, bool inplace, bool entropy, const float* targets) {
  const vcpo::TokenGradients gradients{
      b.logp.data(), b.entropy.data(), b.lse.data(), b.g.data(), entropy ? b.h.data() : nullptr, targets};
  run_backward<C, kSoftcap>(b.output(inplace), b.rows(), b.tokens(), b.scaling, gradients,
                            inplace ? Launch::kBackward : Launch::kForward);
}

void check_shards();  // cuda_shards.cpp
