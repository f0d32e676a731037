// Large buffers that are about to be written for the first time.
//
// A gradient of N V elements comes fresh from the allocator, and its page faults cost more than filling it: 256 rows of
// 151,936 bf16 are 19,000 faults of 4 KiB (49 ms on one core of a Cascade Lake virtual machine), or 38 of 2 MiB (26
// ms).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vcpo {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Whether the buffer has no memory behind it yet (judged by its middle), and if so asks for huge pages. Only a hint:
// where the system cannot tell or refuses, nothing changes.
inline bool prepare_if_fresh(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 4096;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  if (end <= begin) return false;
  unsigned char resident = 1;
  const std::uintptr_t middle = (begin + (end - begin) / 2) / kPage * kPage;
  if (mincore(reinterpret_cast<void*>(middle), kPage, &resident) != 0 || (resident & 1) != 0) return false;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  return true;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

}  // namespace vcpo
