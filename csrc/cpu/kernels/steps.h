#pragma once

#include <cstdint>

#include "dispatch.h"
#include "moments.h"

namespace andmask {

// One step for one parameter tensor. State is kept in the wide type: float32, or float64 for
// float64 parameters.
struct SgdTask {
  void* param;
  void* momentum_buffer;  // null without momentum
  double lr, momentum, dampening, weight_decay;
  bool decoupled_weight_decay, nesterov, maximize;
  bool first;  // the buffer does not hold anything yet
};

struct AdamTask {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;             // null without amsgrad
  double correction1, correction2;  // of the bias: 1 - beta^step
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, maximize;
};

struct TemporalAdamTask {
  AdamTask adam;
  void* sign_avg;
  double beta3, correction3, tau;
};

// Each consumes update[0, end - begin), the aggregated gradient of columns [begin, end) in the wide
// type; at most kUpdateBlock columns.
struct StepKernels {
  void (*store[kDtypes])(const void* update, void* out, int64_t begin, int64_t end);
  void (*sgd[kDtypes])(const SgdTask& task, const void* update, int64_t begin, int64_t end);
  void (*adam[kDtypes])(const AdamTask& task, const void* update, int64_t begin, int64_t end);
  void (*temporal_adam[kDtypes])(const TemporalAdamTask& task, const void* update, int64_t begin,
                                 int64_t end);
};

ANDMASK_DECLARE_KERNELS(StepKernels, step_kernels)

}  // namespace andmask
