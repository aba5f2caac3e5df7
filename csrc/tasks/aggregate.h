#pragma once

#include <cstdint>

#include "dtype.h"

namespace andmask {

// One rule on stacked gradients.
struct AggregateTask {
  const void* grads;     // [environments, columns]; a row is contiguous
  int64_t environments;  // d >= 1
  int64_t stride;        // elements from one row to the next
  int64_t columns;       // >= 1
  Dtype dtype;
  int moment_rule;          // index in MomentRules, or -1
  int column_rule;          // index in ColumnRules, or -1
  const double* arguments;  // of the rule, in host memory
  bool rescale;             // by the inverse of the mean factor (moment rules with a mask only)
  const void* noise;  // [columns], float32, or float64 for float64 gradients; null where not needed
  void* wide;  // [columns], float32 or float64: where the first of two passes writes; may be `out`
  void* out;   // [columns], in the type of the gradients
};

}  // namespace andmask
