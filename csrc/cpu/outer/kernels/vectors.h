// Registers of the instruction set, for the kernels of outer products.
#pragma once

#include "../../../math/scalar.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace andmask {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

ANDMASK_INLINE int32_t lane_index(float) { return 0; }
ANDMASK_INLINE int64_t lane_index(double) { return 0; }

template <typename F>
struct Register {
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(F));
  typedef F type __attribute__((vector_size(kVectorBytes)));
  typedef decltype(lane_index(F())) indices __attribute__((vector_size(kVectorBytes)));
};

template <typename F>
using Vector = typename Register<F>::type;
template <typename F>
constexpr int kLanes = Register<F>::kLanes;

template <typename F>
ANDMASK_INLINE Vector<F> load(const F* values) {
  Vector<F> vector;
  __builtin_memcpy(&vector, values, sizeof vector);
  return vector;
}

template <typename F>
ANDMASK_INLINE void store(F* values, Vector<F> vector) {
  __builtin_memcpy(values, &vector, sizeof vector);
}

ANDMASK_INLINE Vector<float> broadcast(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return Vector<float>{value, value, value, value};
#endif
}

ANDMASK_INLINE Vector<double> broadcast(double value) {
#if defined(__AVX512F__)
  return _mm512_set1_pd(value);
#elif defined(__AVX2__)
  return _mm256_set1_pd(value);
#else
  return Vector<double>{value, value};
#endif
}

// a * b + c, with one rounding if the processor has FMA, as in every matrix product.
// -ffp-contract=off keeps the compiler from fusing by itself.
ANDMASK_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

ANDMASK_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace
}  // namespace andmask
