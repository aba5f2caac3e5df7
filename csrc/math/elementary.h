// Logarithm, exponential and hyperbolic tangent.
//
// Kernels may not call libm: a call ends vectorisation, and its last bits change from one libc to
// the next. These functions have no branch, call or table, so that loops over them become vector
// code at any width, and every step is an IEEE operation, so that each width gives the same bits.
// Polynomials are Taylor series, long enough that a minimax fit would gain no accuracy.
// float takes exp and tanh through double, with one rounding more.
#pragma once

#include "scalar.h"

namespace andmask {

ANDMASK_INLINE uint64_t bits_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

ANDMASK_INLINE double double_of(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The constants of the two formats. ln 2 is split so that kLn2Hi times any exponent is exact.
template <typename T>
struct Real;

template <>
struct Real<float> {
  using Bits = uint32_t;
  static constexpr int kFractionBits = 23;
  static constexpr Bits kBias = 127;
  static constexpr Bits kSqrtHalf = 0x3f3504f3u;  // the bits of sqrt(1/2)
  static constexpr float kSmallestNormal = 0x1p-126f;
  static constexpr float kLn2Hi = 0x1.62e4p-1f;
  static constexpr float kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr int kLastPower = 9;  // of the series in log_of
  ANDMASK_INLINE float of(Bits bits) { return float_of(bits); }
};

template <>
struct Real<double> {
  using Bits = uint64_t;
  static constexpr int kFractionBits = 52;
  static constexpr Bits kBias = 1023;
  static constexpr Bits kSqrtHalf = 0x3fe6a09e667f3bcdu;
  static constexpr double kSmallestNormal = 0x1p-1022;
  static constexpr double kLn2Hi = 0x1.62e42fefa38p-1;
  static constexpr double kLn2Lo = 0x1.ef35793c7673p-45;
  static constexpr int kLastPower = 21;
  ANDMASK_INLINE double of(Bits bits) { return double_of(bits); }
};

// 2/n + 2/(n + 2) z + 2/(n + 4) z^2 + ... up to 2/last
template <int n, int last, typename T>
ANDMASK_INLINE T atanh_series(T z) {
  if constexpr (n < last) {
    return T(2) / T(n) + z * atanh_series<n + 2, last>(z);
  } else {
    return T(2) / T(n);
  }
}

// The natural logarithm of a float or double; NaN below zero.
// x = 2^k m with m in [sqrt(1/2), sqrt(2)); with f = m - 1 and s = f / (2 + f),
// ln m = 2 atanh(s) = 2s + sR, where R = 2/3 s^2 + 2/5 s^4 + ...; because 2s = f - sf, this is
// f - s(f - R): f is exact, and the rounding errors are those of the small second term.
template <typename T>
ANDMASK_INLINE T log_of(T x) {
  using R = Real<T>;
  using Bits = typename R::Bits;
  constexpr Bits kUnit = Bits{1} << R::kFractionBits;  // also one step of the exponent field
  const bool subnormal = x < R::kSmallestNormal;
  const Bits bits = bits_of(subnormal ? x * T(kUnit) : x);
  // The exponent field now steps at sqrt(1/2) times a power of two.
  const Bits shifted = bits + (R::kBias * kUnit - R::kSqrtHalf);
  const T m = R::of((shifted & (kUnit - 1)) + R::kSqrtHalf);
  // The exponent becomes a number as the last bits of kUnit + exponent: few machines have a vector
  // instruction that converts 64-bit integers.
  const T raised = R::of((R::kBias + R::kFractionBits) * kUnit | shifted >> R::kFractionBits);
  const T k = raised - (subnormal ? T(kUnit + R::kBias + R::kFractionBits) : T(kUnit + R::kBias));

  const T f = m - T(1);
  const T s = f / (T(2) + f);
  const T z = s * s;
  const T small = s * (f - z * atanh_series<3, R::kLastPower>(z));
  const T finite = k * R::kLn2Hi - ((small - k * R::kLn2Lo) - f);

  const T infinity = float_of(0x7f800000u);
  const T nan = float_of(0x7fc00000u);
  return x > T(0) ? (x < infinity ? finite : infinity) : (x == T(0) ? -infinity : nan);
}

// e^x = 2^k (1 + p): k is a whole number, p has a small relative error.
struct Exponential {
  double k;
  double p;
};

// Adding this rounds to the nearest whole number, because the sum has no bits behind the point.
constexpr double kRoundToWhole = 0x1.8p52;

// For |x| < 2^50. The caller clamps x to the range of the result.
ANDMASK_INLINE Exponential reduced_exp(double x) {
  const double k = (x * 0x1.71547652b82fep+0 + kRoundToWhole) - kRoundToWhole;  // of x / ln 2
  const double r = (x - k * Real<double>::kLn2Hi) - k * Real<double>::kLn2Lo;   // |r| <= ln(2) / 2
  double q = 1.0 / 6227020800;                                                  // 1/13!
  q = 1.0 / 479001600 + r * q;
  q = 1.0 / 39916800 + r * q;
  q = 1.0 / 3628800 + r * q;
  q = 1.0 / 362880 + r * q;
  q = 1.0 / 40320 + r * q;
  q = 1.0 / 5040 + r * q;
  q = 1.0 / 720 + r * q;
  q = 1.0 / 120 + r * q;
  q = 1.0 / 24 + r * q;
  q = 1.0 / 6 + r * q;
  q = 1.0 / 2 + r * q;
  return {k, r + r * r * q};
}

// 2^k for a whole number k in [-1022, 1023]: the last bits of the sum are the biased exponent.
ANDMASK_INLINE double power_of_two(double k) {
  return double_of(bits_of(k + (kRoundToWhole + 1023)) << 52);
}

ANDMASK_INLINE double exp_of(double x) {
  // Beyond these ends the result is zero or infinity already. NaN passes both comparisons.
  const double below = x > 710.0 ? 710.0 : x;
  const auto [k, p] = reduced_exp(below < -746.0 ? -746.0 : below);
  // 2^k itself may lie outside the range of double; the two halves of k do not.
  const double half = (k * 0.5 + kRoundToWhole) - kRoundToWhole;
  return (1.0 + p) * power_of_two(half) * power_of_two(k - half);
}

// tanh |x| = E / (E + 2) with E = e^(2|x|) - 1 = 2^k p + (2^k - 1), which keeps its relative
// accuracy near zero, where k = 0 and E = p.
ANDMASK_INLINE double tanh_of(double x) {
  const uint64_t sign = bits_of(x) & (uint64_t{1} << 63);
  const double magnitude = double_of(bits_of(x) ^ sign);
  const auto [k, p] = reduced_exp(2.0 * (magnitude > 20.0 ? 20.0 : magnitude));  // tanh 20 = 1
  const double power = power_of_two(k);
  const double expm1 = power * p + (power - 1.0);
  return double_of(bits_of(expm1 / (expm1 + 2.0)) | sign);
}

}  // namespace andmask
