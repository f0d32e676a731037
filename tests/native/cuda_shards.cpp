// Shards of the vocabulary on the CUDA kernels: the states that a pass leaves of each, merged, are the whole rows', and
// each shard's backward is its part of the whole rows' gradient.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "cuda_batch.h"

namespace {

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
    run_backward<C, false>(out, rows, {ids.data(), b.mask.data(), false}, b.scaling, gradients, Launch::kForward);
  }
  for (std::int64_t r = 0; r < b.kCount; ++r)
    for (std::int64_t v = 0; v < kVocabulary; ++v) {
      const std::size_t at = static_cast<std::size_t>(r * 704 + v);
      const double one = vcpo::to_float(whole.grad[at]), two = vcpo::to_float(b.grad[at]);
      CHECK(one == two, "by blocks of the vocabulary row %d: %g, whole %g", int(r), two, one);
    }
}

// A shard [begin, end) of a batch's rows, in guarded memory of its own: ids count from its first entry.
template <class T>
struct Shard {
  std::int64_t begin, width, stride;
  Guarded<T> z, grad;
  Guarded<std::int64_t> ids;
  Guarded<float> states;

  Shard(Batch<T>& whole, std::int64_t begin_, std::int64_t end, bool aligned, typename Guarded<T>::Side side)
      : begin(begin_),
        width(end - begin_),
        stride(aligned ? (width + kWidth - 1) / kWidth * kWidth : width),
        z(static_cast<std::size_t>((whole.kCount - 1) * stride + width), side),
        grad(z.size(), side),
        ids(whole.kCount, Guarded<std::int64_t>::kEnd),
        states(5 * whole.kCount, Guarded<float>::kEnd) {
    for (std::size_t i = 0; i < z.size(); ++i) z[i] = grad[i] = vcpo::from_float<T>(NAN);
    for (std::int64_t r = 0; r < whole.kCount; ++r) {
      ids[static_cast<std::size_t>(r)] = whole.ids[static_cast<std::size_t>(r)] - begin;
      for (std::int64_t v = 0; v < width; ++v) z[static_cast<std::size_t>(r * stride + v)] = whole.row(r)[begin + v];
    }
  }

  vcpo::Rows rows(const Batch<T>& whole) const {
    return {z.data(), dtype_of<T>(), whole.kOuter, whole.kInner, width, whole.kInner * stride, stride};
  }
  vcpo::ShardState state(std::int64_t r) const {
    const auto at = [&](std::int64_t number) {
      return states[static_cast<std::size_t>(number * Batch<T>::kCount + r)];
    };
    return {at(0), at(1), at(2), at(3), at(4)};
  }

 private:
  static constexpr std::int64_t kWidth = 16 / static_cast<std::int64_t>(sizeof(T));
};

double capped(double z, float softcap) { return softcap > 0 && z > -INFINITY ? softcap * std::tanh(z / softcap) : z; }

// A shard's numbers against sums in double, relative to the reference that it has.
template <class T>
void check_states(const char* what, const Batch<T>& whole, Shard<T>& shard) {
  const double bits = vcpo::kLog2e / whole.scaling.temperature;
  for (std::int64_t r = 0; r < whole.kCount; ++r) {
    const vcpo::ShardState got = shard.state(r);
    const std::int64_t y = shard.ids[static_cast<std::size_t>(r)];
    const bool in_sight = r != 3 && y >= 0 && y < shard.width;
    const float target = in_sight ? vcpo::to_float(shard.z[static_cast<std::size_t>(r * shard.stride + y)]) : -INFINITY;
    CHECK(got.target_logit == target, "%s row %d: target %g, want %g", what, int(r), got.target_logit, target);
    double top = -INFINITY, sum_exp = 0, sum_centred = 0, sum_sq = 0;
    bool an_entry = false;
    for (std::int64_t v = 0; r != 3 && v < shard.width; ++v) {
      if (v == y) continue;
      const double z =
          capped(vcpo::to_float(shard.z[static_cast<std::size_t>(r * shard.stride + v)]), whole.scaling.softcap);
      if (z == -INFINITY) continue;
      const double t = (z - got.reference) * bits, e = std::exp2(t);
      an_entry = an_entry || z == got.reference;
      top = std::max(top, z), sum_exp += e, sum_centred += e > 0 ? t * e : 0, sum_sq += e * e;
    }
    if (top == -INFINITY) {
      CHECK(got.reference == -INFINITY && got.sum_exp == 0 && got.sum_centred == 0 && got.sum_sq == 0,
            "%s row %d: the state of no entries", what, int(r));
      continue;
    }
    CHECK(whole.scaling.softcap > 0 || an_entry, "%s row %d: reference %g is no logit", what, int(r), got.reference);
    // sum_centred to within sum_exp: an exponent is off by what the softcap's fp32 scale is rounded by.
    CHECK(close(got.sum_exp, sum_exp, 2e-6) && close(got.sum_sq, sum_sq, 2e-6) &&
              std::abs(got.sum_centred - sum_centred) <= 2e-6 * (1 + std::abs(sum_centred) + sum_exp),
          "%s row %d: %g %g %g, want %g %g %g", what, int(r), got.sum_exp, got.sum_centred, got.sum_sq, sum_exp,
          sum_centred, sum_sq);
  }
}

// What a rank makes of all shards' states, in their order.
template <class T>
void merge_into(Batch<T>& whole, const std::vector<Shard<T>*>& shards) {
  const double bits = vcpo::kLog2e / whole.scaling.temperature;
  for (std::int64_t r = 0; r < whole.kCount; ++r) {
    const std::size_t i = static_cast<std::size_t>(r);
    vcpo::RowState<double> rest = vcpo::empty_row_state<double>();
    double target = -INFINITY;
    for (const Shard<T>* shard : shards) {
      const vcpo::ShardState s = shard->state(r);
      rest = vcpo::merged<double>(rest, {s.reference, s.sum_exp, s.sum_centred, s.sum_sq}, bits);
      target = std::max<double>(target, s.target_logit);
    }
    vcpo::RowStatistics stats{};
    if (whole.mask[i]) stats = vcpo::statistics_of(rest, capped(target, whole.scaling.softcap) * bits, bits);
    if (r == 5) stats.forget_token();
    whole.statistics().write(r, stats);
    whole.target[i] = static_cast<float>(target);
  }
}

// Three shards, of which one may be empty: their states, the statistics of all, and the gradient of each.
template <class Stream, bool kSoftcap>
void check_split(const char* what, std::int64_t vocabulary, bool inplace, bool entropy) {
  using T = typename Stream::C::T;
  using C = vcpo::Chunk<T, Stream::C::aligned, vcpo::kBackward.vectors>;
  const auto side = Stream::C::aligned ? Guarded<T>::kBegin : Guarded<T>::kEnd;
  Batch<T> whole(vocabulary, vocabulary, Guarded<T>::kEnd, kSoftcap ? 12.0f : 0.0f);
  whole.ids[5] = std::numeric_limits<std::int64_t>::max();  // no shard's
  // A block has no more digits than its statistics: no lost_digits here.
  const std::int64_t peak = (whole.ids[7] + 1) % vocabulary;
  whole.before[static_cast<std::size_t>(7 * vocabulary + peak)] = whole.row(7)[peak] = vcpo::from_float<T>(1.0f);
  const std::int64_t first = vocabulary / 3, second = vocabulary - vocabulary / 4;
  Shard<T> a(whole, 0, first, Stream::C::aligned, side), b(whole, first, second, Stream::C::aligned, side),
      c(whole, second, vocabulary, Stream::C::aligned, side);
  std::vector<Shard<T>*> shards;
  for (Shard<T>* shard : {&a, &b, &c})
    if (shard->width > 0) shards.push_back(shard);
  for (Shard<T>* shard : shards) {
    const vcpo::Tokens tokens{shard->ids.data(), whole.mask.data(), false};
    std::vector<std::uint32_t> bits;
    for (const auto order : {Launch::kForward, Launch::kBackward}) {
      for (std::size_t i = 0; i < shard->states.size(); ++i) shard->states[i] = NAN;
      run_forward<Stream>(shard->rows(whole), tokens, whole.scale(),
                          vcpo::ShardStatesOut{shard->states.data(), whole.kCount}, order);
      check_states(what, whole, *shard);
      for (std::size_t i = 0; i < shard->states.size(); ++i) {
        if (order == Launch::kForward) bits.push_back(vcpo::bits_of(shard->states[i]));
        CHECK(vcpo::bits_of(shard->states[i]) == bits[i], "%s: the order of threads shows", what);
      }
    }
  }
  merge_into(whole, shards);
  whole.check_statistics(what);
  for (Shard<T>* shard : shards) {
    const vcpo::TokenGradients gradients{
        whole.logp.data(),  whole.entropy.data(), whole.lse.data(), whole.g.data(), entropy ? whole.h.data() : nullptr,
        whole.target.data()};
    Guarded<T>& to = inplace ? shard->z : shard->grad;
    run_backward<C, kSoftcap>({to.data(), whole.kInner * shard->stride, shard->stride}, shard->rows(whole),
                              {shard->ids.data(), whole.mask.data(), false}, whole.scaling, gradients,
                              inplace ? Launch::kBackward : Launch::kForward);
    for (std::int64_t r = 0; r < whole.kCount; ++r)
      for (std::int64_t v = 0; v < shard->width; ++v)
        whole.grad[static_cast<std::size_t>(r * vocabulary + shard->begin + v)] =
            to[static_cast<std::size_t>(r * shard->stride + v)];
  }
  whole.check_gradient(what, false, entropy);
}

template <class Stream>
void check_stream(const char* what) {
  // Shards of less than a chunk, of some and one entry more, an empty one, and one of a row's only entry.
  for (const std::int64_t vocabulary : {1, 2, 33, 3075}) {
    check_split<Stream, false>(what, vocabulary, false, true);
    check_split<Stream, false>(what, vocabulary, true, false);
  }
  for (const bool inplace : {false, true}) check_split<Stream, true>(what, 3075, inplace, !inplace);
}

// A NaN or +inf among a shard's entries is in its sums, and so in every statistic of the row.
template <class T>
void check_not_finite() {
  using Stream = vcpo::DirectStream<T, 1, 4>;
  for (const float bad : {NAN, INFINITY}) {
    Batch<T> b(300, 300, Guarded<T>::kEnd, 0.0f);
    for (std::int64_t r = 0; r < b.kCount; ++r)
      b.row(r)[(b.ids[static_cast<std::size_t>(r)] + 7) % 300] = vcpo::from_float<T>(bad);
    Guarded<float> states(5 * b.kCount, Guarded<float>::kEnd);
    run_forward<Stream>(b.rows(), b.tokens(), b.scale(), vcpo::ShardStatesOut{states.data(), b.kCount},
                        Launch::kForward);
    for (std::size_t r = 0; r < b.kCount; ++r)
      CHECK(r == 3 ? states[b.kCount + r] == 0 : std::isnan(states[b.kCount + r]), "row %d with %g: sum_exp %g", int(r),
            bad, states[b.kCount + r]);
  }
}

template <class T>
void check_dtype() {
  using vcpo::kForward;
  check_stream<vcpo::BulkStream<T, kForward.warps, kForward.vectors, kForward.stages>>("shards, bulk");
  check_stream<vcpo::AsyncStream<T, kForward.warps, kForward.vectors, kForward.stages>>("shards, async");
  check_stream<vcpo::DirectStream<T, kForward.warps, kForward.vectors>>("shards, direct");
  check_block_backward<T>();
  check_not_finite<T>();
}

}  // namespace

void check_shards() {
  check_dtype<float>();
  check_dtype<vcpo::BFloat16>();
  check_dtype<vcpo::Float16>();
}
