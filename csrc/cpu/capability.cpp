#include "capability.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace andmask {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::v4: return "x86-64-v4";
    case Isa::v3: return "x86-64-v3";
    default: return "baseline";
  }
}

Isa best_isa() {
#if defined(ANDMASK_X86_LEVELS)
  // Every CPU with these has the rest of its level (F16C, LZCNT, MOVBE) too, and the builtin also
  // asks whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_v4 ? Isa::v4 : has_v3 ? Isa::v3 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string wish = variable ? variable : "";
    if (wish == "default") return Isa::baseline;
    if (wish == "avx2") return std::min(best_isa(), Isa::v3);
    return best_isa();  // torch itself warns of a value that it does not know
  }();
  return isa;
}

}  // namespace andmask
