#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace vcpo {
namespace {

std::string listed(const std::vector<Isa>& all) {
  std::string out;
  for (Isa isa : all) out += (out.empty() ? "" : ", ") + std::string(isa_name(isa));
  return out;
}

Isa find(const std::string& name) {
  for (Isa isa : isa_available()) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("VCPO_CPU_ISA: '" + name +
                              "' is not available on this machine; available: " + listed(isa_available()));
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{[] {
    const char* forced = std::getenv("VCPO_CPU_ISA");
    return static_cast<int>(forced != nullptr && *forced != '\0' ? find(forced) : isa_available().back());
  }()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Isa> isa_available() {
  std::vector<Isa> all{Isa::kBaseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) all.push_back(Isa::kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    all.push_back(Isa::kAvx512);
  }
#endif
  return all;
}

Isa isa_chosen() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }
void isa_choose(const std::string& name) { chosen().store(static_cast<int>(find(name)), std::memory_order_relaxed); }

}  // namespace vcpo
