// Which instruction set the CPU kernels use: the best this machine has, unless VCPO_CPU_ISA names another.
#pragma once

#include <string>
#include <vector>

namespace vcpo {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

const char* isa_name(Isa isa);
std::vector<Isa> isa_available();  // compiled in and supported by this CPU, slowest first
Isa isa_chosen();
void isa_choose(const std::string& name);  // throws std::invalid_argument naming the available ones

}  // namespace vcpo
