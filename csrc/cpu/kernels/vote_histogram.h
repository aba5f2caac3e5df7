#pragma once

#include "../../tasks/moments.h"
#include "dispatch.h"
#include "vote_bins.h"

namespace andmask {

struct VoteHistogramKernels {
  // Adds columns [begin, end) to (environments + 1) * lanes bins; indexed by the width of the sums.
  // Returns false if some |votes| were larger than `environments`.
  bool (*add[2])(const MomentArrays& moments, int64_t environments, int64_t begin, int64_t end,
                 int64_t lanes, VoteBin* bins);
};

ANDMASK_DECLARE_KERNELS(VoteHistogramKernels, vote_histogram_kernels)

}  // namespace andmask
