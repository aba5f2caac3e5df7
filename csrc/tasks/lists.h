// Tasks on lists of parameter tensors, each a row of `sizes[i]` elements in memory.
#pragma once

#include <vector>

#include "moments.h"
#include "steps.h"

namespace andmask {

struct AccumulateList {
  std::vector<AccumulateTask> tasks;  // their weights are in host memory
  std::vector<Dtype> dtypes;          // of the gradients
  std::vector<int64_t> sizes;
};

// The updates that one rule makes of the moments of all tensors.
struct UpdateList {
  std::vector<ResolveTask> tasks;  // their arguments are in host memory, and the same for all
  std::vector<int64_t> sizes;
  int rule;      // index in MomentRules
  bool rescale;  // each tensor by the inverse of its mean factor
};

}  // namespace andmask
