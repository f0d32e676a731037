// The CUDA kernels without a GPU: the lines that nvcc compiles, on csrc/cuda/device_on_host.h. Every path of every row
// op against plain loops in double, in guarded memory, with a block's threads in either order; and the launch plans.
//
// What this cannot show is device.cuh itself, ordering between threads that run at once, and speed.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cuda/plan.h"
#include "../../csrc/cuda/score_rows.cuh"
#include "../../csrc/cuda/token_stats.cuh"
#include "checks.h"

namespace {

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

std::size_t backward_shared(int warps) {
  return sizeof(vcpo::RowGradient) + static_cast<std::size_t>(warps) * sizeof(vcpo::RowState<float>);
}

template <class Stream>
void run_forward(Batch<typename Stream::C::T>& b, Launch::Order order) {
  const Launch launch{b.kCount, Stream::kWarps * vcpo::kLanes, 1, shared_of<Stream>(), order};
  vcpo::device::run(launch, [&] {
    const auto kernel = b.scale().softcap ? vcpo::token_stats_forward_kernel<Stream, true, 1>
                                          : vcpo::token_stats_forward_kernel<Stream, false, 1>;
    kernel(b.rows(), b.tokens(), b.scale(), b.statistics());
  });
}

template <class C, bool kSoftcap>
void run_backward(Batch<typename C::T>& b, bool inplace, bool entropy, const float* targets) {
  constexpr int kWarps = vcpo::kBackward.warps;
  const vcpo::TokenGradients gradients{
      b.logp.data(), b.entropy.data(), b.lse.data(), b.g.data(), entropy ? b.h.data() : nullptr, targets};
  const Launch launch{b.kCount, kWarps * vcpo::kLanes, 1, backward_shared(kWarps),
                      inplace ? Launch::kBackward : Launch::kForward};
  vcpo::device::run(launch, [&] {
    const auto kernel = entropy ? vcpo::token_stats_backward_kernel<C, kWarps, kSoftcap, true, 1>
                                : vcpo::token_stats_backward_kernel<C, kWarps, kSoftcap, false, 1>;
    kernel(b.output(inplace), b.rows(), b.tokens(), b.scaling, b.scale(), gradients);
  });
}

template <class Stream>
void run_score(Batch<typename Stream::C::T>& b, bool inplace) {
  const Launch launch{b.kCount, Stream::kWarps * vcpo::kLanes, 1, shared_of<Stream>(),
                      inplace ? Launch::kBackward : Launch::kForward};
  vcpo::device::run(launch, [&] {
    const auto kernel =
        b.scale().softcap ? vcpo::score_rows_kernel<Stream, true> : vcpo::score_rows_kernel<Stream, false>;
    kernel(b.output(inplace), b.rows(), b.tokens(), b.scaling, b.scale(), b.g.data(), b.statistics());
  });
}

template <class T>
void run_cluster(Batch<T>& b, int blocks, bool inplace) {
  using Slice = vcpo::ResidentSlice<T, 2, vcpo::kCluster.vectors>;
  const std::int64_t whole = b.vocabulary / Slice::C::kSize;
  const int capacity = static_cast<int>((whole + blocks - 1) / blocks);
  const std::size_t shared =
      Slice::bytes(capacity) + (1 + Slice::kWarps) * sizeof(vcpo::RowState<float>) + sizeof(vcpo::RowGradient);
  const Launch launch{b.kCount * blocks, Slice::kWarps * vcpo::kLanes, blocks, shared,
                      inplace ? Launch::kBackward : Launch::kForward};
  vcpo::device::run(launch, [&] {
    const auto kernel = b.scale().softcap ? vcpo::score_rows_cluster_kernel<Slice, true, 1>
                                          : vcpo::score_rows_cluster_kernel<Slice, false, 1>;
    kernel(b.output(inplace), b.rows(), b.tokens(), b.scaling, b.scale(), b.g.data(), b.statistics(), capacity);
  });
}

template <class Stream>
void check_forward(const char* what, std::int64_t vocabulary, std::int64_t stride,
                   typename Guarded<typename Stream::C::T>::Side side, float softcap) {
  using T = typename Stream::C::T;
  Batch<T> b(vocabulary, stride, side, softcap);
  run_forward<Stream>(b, Launch::kForward);
  b.check_statistics(what);
  Batch<T> again(vocabulary, stride, side, softcap);
  run_forward<Stream>(again, Launch::kBackward);
  for (std::size_t i = 0; i < b.kCount; ++i)
    CHECK(vcpo::bits_of(b.lse[i]) == vcpo::bits_of(again.lse[i]), "%s: the order of threads shows", what);
}

template <class T, bool kAligned>
void check_backward(std::int64_t vocabulary, std::int64_t stride, typename Guarded<T>::Side side, float softcap) {
  using C = vcpo::Chunk<T, kAligned, vcpo::kBackward.vectors>;
  for (const bool inplace : {false, true}) {
    for (const bool entropy : {false, true}) {
      Batch<T> b(vocabulary, stride, side, softcap);
      run_forward<vcpo::DirectStream<T, 1, 4>>(b, Launch::kForward);
      softcap > 0 ? run_backward<C, true>(b, inplace, entropy, nullptr)
                  : run_backward<C, false>(b, inplace, entropy, nullptr);
      b.check_gradient("backward", inplace, entropy);
    }
  }
}

// A block of a vocabulary: the target's logit given, its entry perhaps in another block.
template <class T>
void check_block_backward() {
  constexpr std::int64_t kVocabulary = 700, kFirst = 256;
  using C = vcpo::Chunk<T, true, vcpo::kBackward.vectors>;
  Batch<T> whole(kVocabulary, 704, Guarded<T>::kBegin, 0.0f), b(kVocabulary, 704, Guarded<T>::kBegin, 0.0f);
  whole.ids[5] = b.ids[5] = 3;
  for (Batch<T>* batch : {&whole, &b})  // a block cannot have lost digits again
    batch->row(7)[batch->ids[7] + 1] = vcpo::from_float<T>(1.0f);
  run_forward<vcpo::DirectStream<T, 1, 4>>(whole, Launch::kForward);
  run_backward<C, false>(whole, false, true, nullptr);
  run_forward<vcpo::DirectStream<T, 1, 4>>(b, Launch::kForward);
  for (std::size_t i = 0; i < b.kCount; ++i)
    if (b.ids[i] >= 0) b.target[i] = vcpo::to_float(b.row(static_cast<std::int64_t>(i))[b.ids[i]]);
  for (const auto& [begin, width] :
       {std::pair<std::int64_t, std::int64_t>{0, kFirst}, {kFirst, kVocabulary - kFirst}}) {
    Guarded<std::int64_t> ids(b.kCount, Guarded<std::int64_t>::kEnd);
    for (std::size_t i = 0; i < b.kCount; ++i) ids[i] = b.ids[i] - begin;
    vcpo::Rows rows = b.rows();
    rows.data = b.z.data() + begin, rows.vocabulary = width;
    vcpo::Output out = b.output(false);
    out.data = b.grad.data() + begin;
    const vcpo::TokenGradients gradients{b.logp.data(), b.entropy.data(), b.lse.data(),
                                         b.g.data(),    b.h.data(),       b.target.data()};
    const Launch launch{b.kCount, 4 * vcpo::kLanes, 1, backward_shared(4), Launch::kForward};
    vcpo::device::run(launch, [&] {
      vcpo::token_stats_backward_kernel<C, 4, false, true, 1>(out, rows, {ids.data(), b.mask.data(), false}, b.scaling,
                                                              b.scale(), gradients);
    });
  }
  for (std::int64_t r = 0; r < b.kCount; ++r)
    for (std::int64_t v = 0; v < kVocabulary; ++v) {
      const std::size_t at = static_cast<std::size_t>(r * 704 + v);
      const double one = vcpo::to_float(whole.grad[at]), two = vcpo::to_float(b.grad[at]);
      CHECK(one == two, "by blocks of the vocabulary row %d: %g, whole %g", int(r), two, one);
    }
}

template <class T, class Run>
void check_score(const char* what, std::int64_t vocabulary, std::int64_t stride, typename Guarded<T>::Side side,
                 float softcap, const Run& run) {
  for (const bool inplace : {false, true}) {
    Batch<T> b(vocabulary, stride, side, softcap);
    run(b, inplace);
    b.check_statistics(what);
    b.check_gradient(what, inplace, false);
  }
}

// Every path on rows of one width. Aligned rows have strides of 16 bytes, and end at the guarding page where that
// leaves their beginning aligned.
template <class T>
void check_width(std::int64_t vocabulary, float softcap) {
  using vcpo::kForward;
  using vcpo::kScore;
  const std::int64_t width = 16 / static_cast<std::int64_t>(sizeof(T)),
                     padded = (vocabulary + width - 1) / width * width;
  const auto end = Guarded<T>::kEnd, aligned = vocabulary == padded ? end : Guarded<T>::kBegin;
  check_forward<vcpo::BulkStream<T, kForward.warps, kForward.vectors, kForward.stages>>("bulk", vocabulary, padded,
                                                                                        aligned, softcap);
  check_forward<vcpo::AsyncStream<T, kForward.warps, kForward.vectors, kForward.stages>>("async", vocabulary, padded,
                                                                                         aligned, softcap);
  check_forward<vcpo::DirectStream<T, kForward.warps, kForward.vectors>>("direct", vocabulary, vocabulary, end,
                                                                         softcap);
  check_backward<T, true>(vocabulary, padded, aligned, softcap);
  check_backward<T, false>(vocabulary, vocabulary, end, softcap);
  // Fewer warps than a GPU gets: 32 of them would be mostly idle at these widths.
  check_score<T>("score, async", vocabulary, padded, aligned, softcap, [](Batch<T>& b, bool inplace) {
    run_score<vcpo::AsyncStream<T, 2, kScore.vectors, kScore.stages>>(b, inplace);
  });
  check_score<T>("score, direct", vocabulary, vocabulary, end, softcap,
                 [](Batch<T>& b, bool inplace) { run_score<vcpo::DirectStream<T, 2, kScore.vectors>>(b, inplace); });
  for (const int blocks : {1, 2, 4}) {
    check_score<T>("score, cluster", vocabulary, padded, aligned, softcap,
                   [&](Batch<T>& b, bool inplace) { run_cluster(b, blocks, inplace); });
  }
}

template <class T>
void check_dtype() {
  // Chunks of a warp are 1024 entries of 2 bytes or 512 of 4: less than one, exactly some, one entry more.
  for (const std::int64_t vocabulary : {1, 7, 33, 512, 1023, 1024, 1025, 4096, 9001}) check_width<T>(vocabulary, 0.0f);
  for (const std::int64_t vocabulary : {33, 5000}) check_width<T>(vocabulary, 12.0f);
  check_block_backward<T>();
}

void check_plans() {
  const vcpo::Device a100{0, 80, 163 << 10}, h100{0, 90, 227 << 10};
  CHECK(vcpo::stream_path(true, a100) == vcpo::Path::kAsync, "aligned rows before sm_90");
  CHECK(vcpo::stream_path(true, h100) == vcpo::Path::kBulk, "aligned rows on sm_90");
  CHECK(vcpo::stream_path(false, h100) == vcpo::Path::kDirect, "rows that are not aligned");
  constexpr std::int64_t kChunk = 2056, kOther = 200;
  const auto plan = [&](std::int64_t bytes, const vcpo::Device& device) {
    return vcpo::cluster_plan(bytes / 2048, kChunk, kOther, device);
  };
  CHECK(plan(151936 * 2, a100).blocks == 0, "clusters before sm_90");
  CHECK(plan(32000 * 2, h100).blocks == 1, "64 KB leave room for another block");
  CHECK(plan(151936 * 2, h100).blocks == 4, "152 KB would not, 76 KB do");
  CHECK(plan(151936 * 4, h100).blocks == 8, "608 KB");
  CHECK(plan(262144 * 4, h100).blocks == 8, "1 MB: one block a multiprocessor");
  CHECK(plan(1 << 21, h100).blocks == 0, "2 MB: more than 8 blocks hold");
  for (std::int64_t bytes = 0; bytes <= 1 << 21; bytes += 2048) {
    const vcpo::ClusterPlan p = plan(bytes, h100);
    if (p.blocks == 0) continue;
    CHECK(static_cast<std::int64_t>(p.blocks) * p.capacity >= bytes / 2048, "a plan that does not hold its row");
    CHECK(p.capacity * kChunk + kOther <= h100.shared_per_block, "a plan beyond shared memory");
  }
}

}  // namespace

int main() {
  check_plans();
  check_dtype<float>();
  check_dtype<vcpo::BFloat16>();
  check_dtype<vcpo::Float16>();
  std::printf("%s\n", failures == 0 ? "all passed" : "FAILED");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
