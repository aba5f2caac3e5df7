#pragma once

#include <cstdint>

#include "../../math/columns.h"
#include "dispatch.h"

namespace andmask {

struct Comparator {
  int32_t low, high;  // rows
};

struct ColumnTask {
  const void* grads;     // [environments, columns]; a row is contiguous
  int64_t environments;  // d >= 1
  int64_t stride;        // elements from one row to the next
  const double* arguments;
  const void* noise;  // [columns], in the wide type (float32, or float64 for float64 gradients)
  void* out;          // [columns], as the gradients; in the wide type for a rule that fills

  // For a ranked rule only: the weights of the ranks ([environments] and up to 3 zeros), and the
  // comparators that merge sorted runs of kRun rows. Null: all comparators of the network.
  const double* weights;
  double total;
  const Comparator* comparators;
  int64_t comparator_count;
};

// The kept coordinates of a rule that fills the others.
struct Kept {
  double size;   // sum of absolute values
  double count;  // a whole number
};

struct ColumnKernels {
  // Columns [begin, end); adds to `kept` (rules that fill only). False: out of memory.
  bool (*aggregate[kDtypes][ColumnRules::kSize])(const ColumnTask& task, int64_t begin, int64_t end,
                                                 Kept* kept);
  // Rounds the results of a rule that fills: out = wide, and noise * size where a value is missing.
  void (*fill[kDtypes])(const void* wide, const void* noise, double size, void* out, int64_t begin,
                        int64_t end);
};

// The number of rows that are sorted in registers, by a network without a list.
constexpr int64_t kRun = 32;

ANDMASK_DECLARE_KERNELS(ColumnKernels, column_kernels)

}  // namespace andmask
