#pragma once

#include <cstdint>

#include "../../math/rules.h"
#include "dispatch.h"

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

enum class Width { float32, float64 };
constexpr int kWidths = 2;

struct MomentKernels {
  // Adds to columns [begin, end) of the moments.
  void (*accumulate[kDtypes])(const AccumulateTask& task, int64_t begin, int64_t end);
  // The sum of the rule's factors over columns [begin, end).
  double (*total_factor[kWidths][MomentRules::kSize])(const ResolveTask& task, int64_t begin,
                                                      int64_t end);
  // update[0, end - begin) = factor * value * scale, in the wide type. At most kUpdateBlock
  // columns.
  void (*resolve[kWidths][MomentRules::kSize])(const ResolveTask& task, double scale, int64_t begin,
                                               int64_t end, void* update);
};

// Small enough for all arrays of a block to stay in L1, and for the stack of any thread.
constexpr int64_t kUpdateBlock = 512;

ANDMASK_DECLARE_KERNELS(MomentKernels, moment_kernels)

}  // namespace andmask
