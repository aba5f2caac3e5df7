#pragma once

#include <cstdint>

#include "../../tasks/masked_mean.h"
#include "dispatch.h"

namespace andmask {

struct MaskedMeanKernels {
  // Columns [begin, end) of the task; returns how many of them are kept.
  int64_t (*reduce[kDtypes])(const MaskedMeanTask& task, int64_t begin, int64_t end);
  // out[begin, end) = factor * wide[begin, end); in place where the two types are the same.
  void (*scale[kDtypes])(const void* wide, double factor, void* out, int64_t begin, int64_t end);
};

ANDMASK_DECLARE_KERNELS(MaskedMeanKernels, masked_mean_kernels)

}  // namespace andmask
