#include "masked_mean.h"

#include "../../math/agreement.h"

namespace andmask {
namespace {

// Columns are reduced in blocks whose totals and votes (12 bytes a column) stay in L1. A narrower
// block costs more page changes, because the next environment's row may lie megabytes away.
constexpr int64_t kBlock = 1024;

// Rows read side by side. Their sum is taken in registers, in float32 (float64 for float64), before
// it joins the float64 total, so that rounding errors do not grow with the number of environments.
// The grouping is part of the result: it is the same for all instruction sets and thread counts.
constexpr int kRows = 8;

template <int rows, typename T>
void add_rows(const T* __restrict grads, int64_t stride, int64_t columns, double* __restrict totals,
              int32_t* __restrict votes) {
  for (int64_t column = 0; column < columns; ++column) {
    accumulate_t<T> sum = 0;
    int32_t vote = 0;
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const auto grad = widen(grads[row * stride + column]);
      sum += grad;
      vote += sign(grad);
    }
    totals[column] += static_cast<double>(sum);
    votes[column] += vote;
  }
}

template <typename T>
void add_environments(const T* grads, int64_t environments, int64_t stride, int64_t columns,
                      double* totals, int32_t* votes) {
  for (; environments >= kRows; environments -= kRows, grads += kRows * stride) {
    add_rows<kRows>(grads, stride, columns, totals, votes);
  }
  switch (environments) {
    case 7: return add_rows<7>(grads, stride, columns, totals, votes);
    case 6: return add_rows<6>(grads, stride, columns, totals, votes);
    case 5: return add_rows<5>(grads, stride, columns, totals, votes);
    case 4: return add_rows<4>(grads, stride, columns, totals, votes);
    case 3: return add_rows<3>(grads, stride, columns, totals, votes);
    case 2: return add_rows<2>(grads, stride, columns, totals, votes);
    case 1: return add_rows<1>(grads, stride, columns, totals, votes);
    default: return;
  }
}

// The mask multiplies; it never selects: a NaN or an infinity under a mask of 0 still shows as NaN.
template <typename Out>
int64_t write(const double* __restrict totals, const int32_t* __restrict votes, int64_t columns,
              int64_t environments, int32_t threshold, Out* __restrict out) {
  const double count = static_cast<double>(environments);
  int64_t kept = 0;
  for (int64_t column = 0; column < columns; ++column) {
    const bool keep = agrees(votes[column], threshold);
    kept += keep;
    out[column] = Rounder<Out>::from(totals[column] / count * (keep ? 1.0 : 0.0));
  }
  return kept;
}

template <typename Out>
int64_t write_mask(const int32_t* __restrict votes, int64_t columns, int32_t threshold,
                   Out* __restrict out) {
  int64_t kept = 0;
  for (int64_t column = 0; column < columns; ++column) {
    const bool keep = agrees(votes[column], threshold);
    kept += keep;
    out[column] = keep ? Out(1) : Out(0);
  }
  return kept;
}

template <typename T>
int64_t reduce(const MaskedMeanTask& task, int64_t begin, int64_t end) {
  using Unscaled = accumulate_t<T>;
  alignas(64) double totals[kBlock];
  alignas(64) int32_t votes[kBlock];
  int64_t kept = 0;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t columns = end - first < kBlock ? end - first : kBlock;
    for (int64_t column = 0; column < columns; ++column) {
      totals[column] = 0;
      votes[column] = 0;
    }
    add_environments(static_cast<const T*>(task.grads) + first, task.environments, task.stride,
                     columns, totals, votes);
    switch (task.output) {
      case Output::masked_mean:
        kept += write(totals, votes, columns, task.environments, task.threshold,
                      static_cast<T*>(task.out) + first);
        break;
      case Output::masked_mean_unscaled:
        kept += write(totals, votes, columns, task.environments, task.threshold,
                      static_cast<Unscaled*>(task.out) + first);
        break;
      case Output::mask_unscaled:
        kept +=
            write_mask(votes, columns, task.threshold, static_cast<Unscaled*>(task.out) + first);
        break;
    }
  }
  return kept;
}

template <typename T>
void scale(const void* unscaled, double factor, void* out, int64_t begin, int64_t end) {
  const auto* from = static_cast<const accumulate_t<T>*>(unscaled);
  auto* to = static_cast<T*>(out);
  for (int64_t column = begin; column < end; ++column) {
    to[column] = Rounder<T>::from(static_cast<double>(from[column]) * factor);
  }
}

}  // namespace

namespace ANDMASK_ISA {
extern const MaskedMeanKernels masked_mean_kernels = {
    {reduce<Half>, reduce<BFloat16>, reduce<float>, reduce<double>},
    {scale<Half>, scale<BFloat16>, scale<float>, scale<double>},
};
}  // namespace ANDMASK_ISA

}  // namespace andmask
