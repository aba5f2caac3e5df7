// Storage types and the exact conversions between them.
//
// Everything in csrc/math is plain C++ without torch, so that the CPU kernels, the CUDA kernels and
// the test harness share one source. All functions have internal linkage: kernel files are compiled
// once per instruction set, and an inline function with external linkage compiled for AVX-512 could
// otherwise be the copy that the linker keeps for everyone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ANDMASK_METHOD __host__ __device__ __forceinline__
#else
#define ANDMASK_METHOD inline __attribute__((always_inline))
#endif
#define ANDMASK_INLINE static ANDMASK_METHOD

namespace andmask {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

ANDMASK_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

ANDMASK_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- to the type that arithmetic is done in: float32, or float64 for float64 ----

ANDMASK_INLINE float widen(float value) { return value; }

ANDMASK_INLINE double widen(double value) { return value; }

ANDMASK_INLINE float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

// Branch-free, so that compilers turn it into vector code. Subnormals are rebuilt by a subtraction
// of two normal numbers: they survive flush-to-zero mode.
ANDMASK_INLINE float widen(Half value) {
#if defined(__CUDA_ARCH__)  // one instruction there, for the same value
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  constexpr uint32_t kRebias = uint32_t{127 - 15} << 23;
  constexpr uint32_t kSmallestNormal = uint32_t{127 - 14} << 23;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t exponent = value.bits & 0x7c00u;
  const uint32_t normal = magnitude + kRebias + (exponent == 0x7c00u ? kRebias : 0u);
  const uint32_t subnormal =
      bits_of(float_of(magnitude | kSmallestNormal) - float_of(kSmallestNormal));
  return float_of((exponent == 0 ? subnormal : normal) | (value.bits & 0x8000u) << 16);
#endif
}

// ---- back to storage, round to nearest, ties to even ----
// There is one NaN, positive and without payload: which of two NaN survives an addition depends on
// the order that a compiler gives to the operands, and so on the instruction set.

template <typename T>
struct Rounder;

template <>
struct Rounder<double> {
  ANDMASK_INLINE double from(double value) {
    return value == value ? value : static_cast<double>(float_of(0x7fc00000u));
  }
};

template <>
struct Rounder<float> {
  ANDMASK_INLINE float from(double wide) {
    const float value = static_cast<float>(wide);
    return value == value ? value : float_of(0x7fc00000u);
  }
};

template <>
struct Rounder<BFloat16> {
  ANDMASK_INLINE BFloat16 from(double wide) {
    const uint32_t bits = bits_of(static_cast<float>(wide));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};

template <>
struct Rounder<Half> {
  ANDMASK_INLINE Half from(double wide) {
    const uint32_t bits = bits_of(static_cast<float>(wide));
    const uint32_t magnitude = bits & 0x7fffffffu;
    // The carry of the rounding may reach the exponent: 65520 becomes infinity, as it should.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding .5 moves the last bit of a half subnormal to the last bit of a float.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t rounded = magnitude >= 0x47800000u ? special : finite;
    const uint32_t sign = magnitude > 0x7f800000u ? 0u : (bits >> 16) & 0x8000u;
    return {static_cast<uint16_t>(rounded | sign)};
  }
};

// Sums of one group of environments are taken in this type.
template <typename T>
struct Accumulate {
  using type = float;
};

template <>
struct Accumulate<double> {
  using type = double;
};

template <typename T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace andmask
