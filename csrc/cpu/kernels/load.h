// Reads a block of gradients in the type of the arithmetic.
#pragma once

#include "../../math/scalar.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace andmask {
namespace {

// Converts float16 ahead of the loop that uses it, because compilers know no vector form of the
// instruction. With it kernels are as fast as for bfloat16, without it three times slower.
ANDMASK_INLINE void widen_columns(const Half* values, int64_t columns, float* wide) {
  int64_t column = 0;
#if defined(__AVX512F__)
  for (; column + 16 <= columns; column += 16) {
    const auto* half = reinterpret_cast<const __m256i*>(values + column);
    _mm512_storeu_ps(wide + column, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(half)));
  }
#elif defined(__F16C__)
  for (; column + 8 <= columns; column += 8) {
    const auto* half = reinterpret_cast<const __m128i*>(values + column);
    _mm256_storeu_ps(wide + column, _mm256_cvtph_ps(_mm_loadu_si128(half)));
  }
#endif
  for (; column < columns; ++column) wide[column] = widen(values[column]);
}

ANDMASK_INLINE void widen_columns(const BFloat16* __restrict values, int64_t columns,
                                  float* __restrict wide) {
  for (int64_t column = 0; column < columns; ++column) wide[column] = widen(values[column]);
}

// Returns the values themselves if they are wide already, else a widened copy in `scratch`.
template <typename T>
ANDMASK_INLINE const accumulate_t<T>* widened(const T* values, int64_t columns,
                                              accumulate_t<T>* scratch) {
  if constexpr (sizeof(T) == sizeof(accumulate_t<T>)) {
    return values;
  } else {
    widen_columns(values, columns, scratch);
    return scratch;
  }
}

}  // namespace
}  // namespace andmask
