#pragma once

#include <cstdint>

#include "dispatch.h"

namespace andmask {

// What is written for every column (coordinate) of the stacked gradients.
enum class Output {
  masked_mean,       // mask * mean, in the element type of the gradients
  masked_mean_wide,  // the same in float32 for the 16-bit types, to be scaled
  mask,              // the mask alone: float32, or float64 for float64 gradients
};

struct MaskedMeanTask {
  const void* grads;     // [environments, columns]; a row is contiguous
  int64_t environments;  // d >= 1
  int64_t stride;        // elements from one row to the next
  int32_t threshold;     // |votes| that keep a column
  Output output;
  void* out;  // [columns]
};

struct MaskedMeanKernels {
  // Columns [begin, end) of the task; returns how many of them are kept.
  int64_t (*reduce[kDtypes])(const MaskedMeanTask& task, int64_t begin, int64_t end);
  // out[begin, end) = factor * wide[begin, end); in place where the two types are the same.
  void (*scale[kDtypes])(const void* wide, double factor, void* out, int64_t begin, int64_t end);
};

ANDMASK_DECLARE_KERNELS(MaskedMeanKernels, masked_mean_kernels)

}  // namespace andmask
