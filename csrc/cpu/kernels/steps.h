#pragma once

#include <cstdint>

#include "../../tasks/steps.h"
#include "dispatch.h"
#include "moments.h"

namespace andmask {

// Each kernel consumes update[0, end - begin), the aggregated gradient of columns [begin, end) in
// the wide type. There are at most kUpdateBlock columns.
struct StepKernels {
  void (*store[kDtypes])(const void* update, void* out, int64_t begin, int64_t end);
  void (*sgd[kDtypes])(const SgdTask& task, const void* update, int64_t begin, int64_t end);
  void (*adam[kDtypes])(const AdamTask& task, const void* update, int64_t begin, int64_t end);
  void (*temporal_adam[kDtypes])(const TemporalAdamTask& task, const void* update, int64_t begin,
                                 int64_t end);
};

ANDMASK_DECLARE_KERNELS(StepKernels, step_kernels)

}  // namespace andmask
