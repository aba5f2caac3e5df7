#pragma once

#include <cstdint>

#include "dtype.h"

namespace andmask {

// The moments of one parameter tensor. `F` is float32, or float64 for float64 gradients.
struct MomentArrays {
  void* sum;       // F
  void* votes;     // int8, int16 or int32; null where not kept
  int vote_bytes;  // 1, 2 or 4
  void* squares;   // F; null where not kept
  void* logs;      // F; null where not kept
};

struct AccumulateTask {
  const void* grads;      // [rows, columns]; a row is contiguous
  int64_t rows;           // environments to add
  int64_t stride;         // elements from one row to the next
  const double* weights;  // [rows]; null: 1
  int64_t count;          // environments added before; 0: what the moments hold is ignored
  MomentArrays moments;
};

struct ResolveTask {
  MomentArrays moments;
  Dtype sum_dtype;          // that of a plain gradient where `sum` is one
  const double* arguments;  // of the rule
  int64_t count;
};

}  // namespace andmask
