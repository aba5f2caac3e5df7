#pragma once

#include <cstdint>
#include <vector>

#include "moments.h"

namespace andmask {

// Of every tensor, for k = 0 ... environments: counts[k], the coordinates with |votes| = k, and
// squares[k], the sum of the squares of their sums.
struct Histograms {
  int64_t environments;
  int64_t* counts;  // [tensors, environments + 1], zeros before
  double* squares;  // the same

  int64_t bins() const { return environments + 1; }
};

struct VoteHistogramTask {
  MomentArrays moments;  // sum and votes
  Dtype dtype;           // of the sum: float32 or float64
};

struct VoteHistogramList {
  std::vector<VoteHistogramTask> tasks;
  std::vector<int64_t> sizes;
  Histograms out;
};

// Of one tensor, whose environments are still to be added up.
struct StackedHistogramTask {
  const void* grads;  // [environments, columns]; a row is contiguous
  int64_t stride;     // elements from one row to the next
  int64_t columns;    // >= 1
  Dtype dtype;
  Histograms out;
};

}  // namespace andmask
