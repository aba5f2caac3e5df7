#pragma once

#include <cstdint>

#include "../../math/rules.h"
#include "../../tasks/moments.h"
#include "dispatch.h"

namespace andmask {

enum class Width { float32, float64 };
constexpr int kWidths = 2;

struct MomentKernels {
  // Adds to columns [begin, end) of the moments.
  void (*accumulate[kDtypes])(const AccumulateTask& task, int64_t begin, int64_t end);
  // Sets the moments of at most kJoinedBlock columns to those of all rows. Votes are int32.
  void (*accumulate_all[kDtypes])(const AccumulateTask& task, int64_t columns);
  // The sum of the rule's factors over columns [begin, end).
  double (*total_factor[kWidths][MomentRules::kSize])(const Update& task, int64_t begin,
                                                      int64_t end);
  // update[0, end - begin) = factor * value * scale * grad_scale, in the wide type. At most
  // kUpdateBlock columns.
  void (*resolve[kWidths][MomentRules::kSize])(const Update& task, double scale, int64_t begin,
                                               int64_t end, void* update);
  // The sum of the squares of what resolve has written.
  double (*squared_norm[kWidths])(const void* update, int64_t columns);
  // The coordinates of columns [begin, end) whose votes reach the thresholds.
  int64_t (*count_kept)(const Update& task, int64_t begin, int64_t end);
};

// All arrays of a block of this many columns stay in L1, and fit on the stack of any thread.
constexpr int64_t kUpdateBlock = 512;
constexpr int64_t kJoinedBlock = 256;

ANDMASK_DECLARE_KERNELS(MomentKernels, moment_kernels)

}  // namespace andmask
