#include <cmath>
#include <cstring>
#include <memory>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../row_ops.h"
#include "row_loop.h"

namespace vcpo {

namespace {

int this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Each thread's room for what a row keeps, from its L2 cache: 600 KB for 151,936 entries. Not zeroed: a page is
// touched first by the thread that it belongs to.
class Scratch {
 public:
  Scratch(const RowKernels& kernels, std::int64_t vocabulary, int threads)
      : blocks_((vocabulary + kernels.block - 1) / kernels.block),
        floats_(blocks_ * kernels.kept_per_block),
        exponentials_(new float[static_cast<std::size_t>(threads * floats_ + kLine)]),
        references_(new double[static_cast<std::size_t>(threads * blocks_)]) {
    void* start = exponentials_.get();
    std::size_t room = static_cast<std::size_t>(threads * floats_ + kLine) * sizeof(float);
    aligned_ = static_cast<float*>(std::align(kLine * sizeof(float), sizeof(float), start, room));
  }
  Kept of_this_thread() const {
    return {aligned_ + this_thread() * floats_, references_.get() + this_thread() * blocks_};
  }

 private:
  static constexpr std::int64_t kLine = 16;
  std::int64_t blocks_, floats_;
  std::unique_ptr<float[]> exponentials_;
  std::unique_ptr<double[]> references_;
  float* aligned_;
};

}  // namespace

void score_rows(const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
                const float* coefficients, const StatisticsOut& statistics, const CpuPlace& place) {
  const RowKernels& kernel = kernels();
  const int dtype = static_cast<int>(rows.dtype);
  const RowScale scale = row_scale(scaling);
  const WritePlan plan = write_plan(out, rows, place.threads);
  const Scratch scratch(kernel, rows.vocabulary, std::max(place.threads, 1));
  for_each_row(rows, place.threads, plan.chunk_bytes, [&](std::int64_t o, std::int64_t i) {
    const Token token = token_of(rows, tokens, o, i);
    char* d = output_at(out, rows.dtype, o, i);
    RowSummary stats{};
    float c = 0.0f;
    if (token.valid) {
      const Kept kept = scratch.of_this_thread();
      const char* row = row_at(rows, o, i);
      const std::int64_t y = tokens.ids[token.at];
      const bool known = y >= 0 && y < rows.vocabulary;
      c = coefficients != nullptr ? coefficients[token.at] : 1.0f;
      stats = c != 0.0f ? kernel.keeping_forward[dtype](row, rows.vocabulary, known ? y : 0, scale, kept)
                        : kernel.forward[dtype](row, rows.vocabulary, known ? y : 0, scale);
      if (!known) stats.forget_token();
      if (c != 0.0f) {
        const TokenGradient saved{stats.logp, stats.entropy, stats.lse, c, 0.0f};
        const RowGradient gradient = row_gradient(stats.lse2, known ? y : -1, saved, scaling, scale);
        if (std::isnan(stats.logp)) {  // the forward may have stopped on the way
          kernel.backward[dtype](d, row, rows.vocabulary, gradient, scale, plan.stream);
        } else {
          kernel.kept_backward[dtype](d, row, rows.vocabulary, gradient, scale, kept, plan.stream);
        }
      }
    }
    if (c == 0.0f) std::memset(d, 0, static_cast<std::size_t>(rows.vocabulary * bytes_of(rows.dtype)));
    statistics.write(token.at, stats);
  });
}

}  // namespace vcpo
