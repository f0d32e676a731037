// What the host's tests of kernels share: failures counted, arrays with unreadable pages around them, rows in double.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "../../csrc/common/dtypes.h"

inline int failures = 0;

#define CHECK(condition, ...)                 \
  do {                                        \
    if (!(condition)) {                       \
      std::printf("FAILED %s: ", #condition); \
      std::printf(__VA_ARGS__);               \
      std::printf("\n");                      \
      ++failures;                             \
    }                                         \
  } while (0)

// An array whose first or last byte touches a page that may not be accessed.
template <class T>
class Guarded {
 public:
  enum Side { kEnd, kBegin };
  Guarded(std::size_t count, Side side) : count_(count) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = count * sizeof(T), inner = (bytes + page - 1) / page * page + page;
    size_ = inner + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + inner, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(side == kEnd ? base_ + page + inner - bytes : base_ + page);
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return count_; }

 private:
  std::size_t count_, size_;
  char* base_;
  T* data_;
};

template <class T>
constexpr vcpo::Dtype dtype_of() {
  return std::is_same_v<T, float>            ? vcpo::Dtype::kFloat32
         : std::is_same_v<T, vcpo::BFloat16> ? vcpo::Dtype::kBFloat16
                                             : vcpo::Dtype::kFloat16;
}

// The dtype's most negative finite number, as float: what a mask fills with.
template <class T>
float lowest() {
  return dtype_of<T>() == vcpo::Dtype::kFloat16 ? -65504.0f : vcpo::to_float(T{vcpo::from_float<T>(-3.3895314e38f)});
}

struct Expected {
  double logp, entropy, score, lse;
  std::vector<double> p;
};

inline Expected expected(const std::vector<double>& x, std::size_t y) {
  Expected e;
  double peak = -INFINITY, total = 0;
  for (double v : x) peak = std::max(peak, v);
  for (double v : x) total += std::exp(v - peak);
  e.lse = peak + std::log(total);
  e.logp = x[y] - e.lse;
  e.entropy = e.score = 0;
  double rest = 0;
  for (std::size_t v = 0; v < x.size(); ++v) {
    const double p = std::exp(x[v] - e.lse);
    e.p.push_back(p);
    if (p > 0) e.entropy -= p * (x[v] - e.lse);
    if (v != y) rest += p, e.score += p * p;
  }
  e.score += rest * rest;
  return e;
}

inline bool close(double got, double want, double tolerance) {
  return std::abs(got - want) <= tolerance * (1 + std::abs(want));
}
