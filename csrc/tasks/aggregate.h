#pragma once

#include <cstdint>

#include "device.h"
#include "dtype.h"

namespace andmask {

// One rule on stacked gradients.
struct AggregateTask {
  const void* grads = nullptr;  // [environments, columns]; a row is contiguous
  int64_t environments = 1;
  int64_t stride = 0;   // elements from one row to the next
  int64_t columns = 0;  // >= 1
  Dtype dtype = Dtype::float32;
  int moment_rule = -1;               // index in MomentRules, or -1
  int column_rule = -1;               // index in ColumnRules, or -1
  const double* arguments = nullptr;  // of the rule, in host memory
  bool rescale = false;               // by the inverse of the mean factor (rules with a mask only)
  // [columns], float32, or float64 for float64 gradients; null for a rule without noise.
  const void* noise = nullptr;
  void* wide = nullptr;  // [columns], float32 or float64: for the first of two passes; may be `out`
  void* out = nullptr;   // [columns], in the type of the gradients
};

void run(const Cpu& cpu, const AggregateTask& task);
void run(const Stream& stream, const AggregateTask& task);

}  // namespace andmask
