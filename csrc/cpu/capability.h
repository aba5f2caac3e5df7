// The instruction set of the CPU kernels.
#pragma once

namespace andmask {

// x86-64 micro-architecture levels: v3 is AVX2 + FMA, v4 is AVX-512. Other machines have
// `baseline`.
enum class Isa { baseline, v3, v4 };

const char* name(Isa isa);

// The best instruction set of this machine for which this library was compiled.
Isa best_isa();

// best_isa(), lowered by ATEN_CPU_CAPABILITY (default, avx2, avx512: torch's own switch). The
// variable is read at the first call.
Isa active_isa();

}  // namespace andmask
