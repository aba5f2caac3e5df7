#pragma once

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
  double correction1, correction2;  // of the bias: 1 - beta^step. Not used if `step` is there
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, maximize;
  float* step = nullptr;  // where a device counts the steps before this one; null on the CPU
};

struct TemporalAdamTask {
  AdamTask adam;
  void* sign_avg;
  double beta3, correction3, tau;
  bool bias_correction = true;  // else the corrections are 1
};

}  // namespace andmask
