#pragma once

#include "moments.h"

namespace andmask {

// One optimizer step for one parameter tensor. State is kept in the wide type: float32, or float64
// for float64 parameters. All but the tensors, their types and sizes, and what is said of `step`
// and the corrections, is the same for all tasks of a call.
struct SgdTask {
  Update update = {};  // takes the place of the gradient
  void* param = nullptr;
  Dtype dtype = Dtype::float32;     // of the parameter
  void* momentum_buffer = nullptr;  // null without momentum
  double lr = 0, momentum = 0, dampening = 0, weight_decay = 0;
  bool decoupled_weight_decay = false, nesterov = false, maximize = false;
  bool first = false;  // the buffer does not hold anything yet
};

struct AdamTask {
  Update update = {};
  void* param = nullptr;
  Dtype dtype = Dtype::float32;
  void* exp_avg = nullptr;
  void* exp_avg_sq = nullptr;
  void* max_exp_avg_sq = nullptr;  // null without amsgrad
  // The bias corrections 1 - beta^step; a device that counts steps makes them itself.
  double correction1 = 1, correction2 = 1;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  bool decoupled_weight_decay = false, maximize = false;
  float* step = nullptr;  // where a device counts the steps before this one; null on the CPU
};

struct TemporalAdamTask : AdamTask {
  void* sign_avg = nullptr;
  double beta3 = 0, correction3 = 1, tau = 0;
  bool bias_correction = true;  // else the corrections are 1
  double significance = 0;      // instead of tau; 0: tau
  double sign_correction = 1;   // 1 - beta3^step, whatever bias_correction
};

void run(const Cpu& cpu, const std::vector<SgdTask>& tasks);
void run(const Stream& stream, const std::vector<SgdTask>& tasks);
void run(const Cpu& cpu, const std::vector<AdamTask>& tasks);
void run(const Stream& stream, const std::vector<AdamTask>& tasks);
void run(const Cpu& cpu, const std::vector<TemporalAdamTask>& tasks);
void run(const Stream& stream, const std::vector<TemporalAdamTask>& tasks);

}  // namespace andmask
