#pragma once

#include "moments.h"

namespace andmask {

// The histogram of one tensor. For k = 0 ... environments: counts[k] is the number of coordinates
// with |votes| = k, and squares[k] the sum of the squares of their sums.
struct Histogram {
  int64_t environments = 1;
  int64_t* counts = nullptr;  // [environments + 1], zeros before
  double* squares = nullptr;  // the same

  int64_t bins() const { return environments + 1; }
};

struct VoteHistogramTask {
  MomentArrays moments = {};     // sum and votes
  Dtype dtype = Dtype::float32;  // of the sum: float32 or float64
  int64_t columns = 0;
  Histogram out = {};
};

// `environments` is the same for all tensors of a call.
void run(const Cpu& cpu, const std::vector<VoteHistogramTask>& tasks);
void run(const Stream& stream, const std::vector<VoteHistogramTask>& tasks);

// The same for one tensor whose environments are still to be added up.
struct StackedHistogramTask {
  const void* grads = nullptr;  // [environments, columns]; a row is contiguous
  int64_t stride = 0;           // elements from one row to the next
  int64_t columns = 0;          // >= 1
  Dtype dtype = Dtype::float32;
  Histogram out = {};
};

void run(const Cpu& cpu, const StackedHistogramTask& task);
void run(const Stream& stream, const StackedHistogramTask& task);

}  // namespace andmask
