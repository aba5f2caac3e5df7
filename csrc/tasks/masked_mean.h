#pragma once

#include <cstdint>

namespace andmask {

// What is made of every column (coordinate) of the stacked gradients.
enum class Output {
  masked_mean,       // mask * mean, in the element type of the gradients
  masked_mean_wide,  // the same in float32 for the 16-bit types, to be scaled
  mask,              // the mask alone: float32, or float64 for float64 gradients
  bins,              // a histogram of the votes, added to what `out` holds (VoteBin, on the CPU)
};

struct MaskedMeanTask {
  const void* grads;     // [environments, columns]; a row is contiguous
  int64_t environments;  // d >= 1
  int64_t stride;        // elements from one row to the next
  int32_t threshold;     // |votes| that keep a column
  Output output;
  void* out;              // [columns]; bins: [(environments + 1) * bin_lanes]
  int64_t bin_lanes = 1;  // bins only: see csrc/cpu/kernels/vote_bins.h
};

}  // namespace andmask
