#pragma once

#include <cstdint>

#include "device.h"
#include "dtype.h"

namespace andmask {

// The result for every column (coordinate) of the stacked gradients.
enum class Output {
  masked_mean,       // mask * mean, in the element type of the gradients
  masked_mean_wide,  // the same in float32 for the 16-bit types, to be scaled
  mask,              // the mask alone: float32, or float64 for float64 gradients
  bins,              // a histogram of the votes, added to what `out` holds (VoteBin, on the CPU)
};

struct MaskedMeanTask {
  const void* grads = nullptr;  // [environments, columns]; a row is contiguous
  int64_t environments = 1;
  int64_t stride = 0;     // elements from one row to the next
  int32_t threshold = 0;  // |votes| that keep a column
  Output output = Output::masked_mean;
  void* out = nullptr;    // [columns]; bins: [(environments + 1) * bin_lanes]
  int64_t bin_lanes = 1;  // bins only: see csrc/cpu/kernels/vote_bins.h
  int64_t columns = 0;    // >= 1
  Dtype dtype = Dtype::float32;
  void* scaled = nullptr;  // [columns]: `out` divided by the share of kept columns; null: no wish
};

void run(const Cpu& cpu, const MaskedMeanTask& task);
void run(const Stream& stream, const MaskedMeanTask& task);

}  // namespace andmask
