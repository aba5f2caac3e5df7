// The AND-mask: Parascandolo et al., "Learning explanations that are hard to vary", ICLR 2021,
// sec. 2.3.
#pragma once

#include "scalar.h"

namespace andmask {

// The vote of one environment: +1, -1, or 0 for zeros of either sign and for NaN. The integer is as
// wide as the argument, so that votes fill the vector lanes of the comparison.
ANDMASK_INLINE int32_t sign(float grad) {
  return static_cast<int32_t>(grad > 0) - static_cast<int32_t>(grad < 0);
}

ANDMASK_INLINE int64_t sign(double grad) {
  return static_cast<int64_t>(grad > 0) - static_cast<int64_t>(grad < 0);
}

// The same for stored bits. A value that is neither zero nor NaN has a magnitude in [1, infinity].
ANDMASK_INLINE int16_t sign_of_bits(uint16_t bits, uint16_t infinity) {
  const bool positive = static_cast<uint16_t>(bits - 1u) < infinity;
  const bool negative = static_cast<uint16_t>(bits - 0x8001u) < infinity;
  return static_cast<int16_t>(static_cast<int16_t>(positive) - static_cast<int16_t>(negative));
}

ANDMASK_INLINE int16_t sign(Half grad) { return sign_of_bits(grad.bits, 0x7c00u); }

ANDMASK_INLINE int16_t sign(BFloat16 grad) { return sign_of_bits(grad.bits, 0x7f80u); }

// The smallest |votes| that keeps a coordinate. Agreement is decided on integers, because tau * d
// in floating point loses ties: 1e-6 is far above the rounding error of tau * d (2.4e-7 at d =
// 2^31) and far below the distance between two integers.
ANDMASK_INLINE int64_t vote_threshold(double tau, int64_t environments) {
  const double bound = tau * static_cast<double>(environments) - 1e-6;
  const int64_t floor = static_cast<int64_t>(bound);
  return floor + (static_cast<double>(floor) < bound ? 1 : 0);
}

// |votes|, for all values of votes: by how many environments the majority wins.
ANDMASK_INLINE uint32_t agreement(int32_t votes) {
  return votes < 0 ? 0u - static_cast<uint32_t>(votes) : static_cast<uint32_t>(votes);
}

ANDMASK_INLINE bool agrees(int32_t votes, int32_t threshold) {
  return (votes < 0 ? -votes : votes) >= threshold;
}

// The order in which the gradients of a column are summed. kSumRows of them are added one after the
// other, then the sums of a group of kSumGroup, in float32 (float64 for float64). Only the groups
// are added in float64. So a gradient is rounded to float32 at most 18 times (3 + 15), however many
// environments there are. The order is part of the result: it is the same for all devices,
// instruction sets and numbers of threads.
constexpr int kSumRows = 4;
constexpr int64_t kSumGroup = 64;

// The mean as it is stored. Multiplication by the inverse of the count may err by one last place of
// float64 more than division, which the narrower types do not see; float64 itself is divided.
// The mask multiplies; it never selects: a NaN or an infinity under a mask of 0 still shows as NaN.
template <typename Out>
ANDMASK_INLINE Out masked_mean_of(double sum, double count, double inverse, bool keep) {
  const double mean = sizeof(Out) == sizeof(double) ? sum / count : sum * inverse;
  return Rounder<Out>::from(mean * (keep ? 1.0 : 0.0));
}

// The factor of `rescale`: the inverse of the mean factor (of a mask: the share of kept
// coordinates) of one parameter tensor.
ANDMASK_INLINE double inverse_density(double kept, double count) {
  return 1.0 / (1e-10 + kept / count);
}

}  // namespace andmask
