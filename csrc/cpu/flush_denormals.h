// Flush subnormal results to zero while in scope: exponentials far below a row's maximum are subnormal, count for
// nothing, and would each cost some hundred cycles of microcode.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace vcpo {

class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;
#else
 public:
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace vcpo
