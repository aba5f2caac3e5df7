#include "capability.h"

#if defined(ANDMASK_X86_LEVELS)
#include <cpuid.h>
#endif

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

#if defined(ANDMASK_X86_LEVELS)
static bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

Isa best_isa() {
#if defined(ANDMASK_X86_LEVELS)
  // Every CPU with these features has the rest of its level (LZCNT, MOVBE) too. The builtin also
  // asks whether the operating system saves the wide registers. Some compilers' builtin lacks F16C.
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_f16c();
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
