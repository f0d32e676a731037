// The CUDA kernels without a GPU: the lines that nvcc compiles, on csrc/cuda/device_on_host.h. Every path of every row
// op against plain loops in double, in guarded memory, with a block's threads in either order; and the launch plans.
//
// What this cannot show is device.cuh itself, ordering between threads that run at once, and speed.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda/score_rows.cuh"
#include "cuda_batch.h"

namespace {

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
  check_shards();
  std::printf("%s\n", failures == 0 ? "all passed" : "FAILED");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
