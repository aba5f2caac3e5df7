// The ops _sgd_step_, _adam_step_ and _temporal_adam_step_: checks and layout.
#pragma once

#include <optional>

#include "../math/steps.h"
#include "moment_lists.h"

namespace andmask {

inline void check_number(const char* op, const char* name, double value, bool holds,
                         const char* expected) {
  check(holds, op, "expected ", name, " ", expected, ", but got ", value);
}

inline void check_beta(const char* op, const char* name, double value) {
  check_number(op, name, value, value >= 0 && value < 1, "in [0, 1)");
}

// Checks parameters, their moments and their state, aligns them, and runs a step.
template <typename Device>
class Step {
 public:
  Step(const char* op, Tensors params, MomentLists moments, int64_t count, const std::string& rule,
       const std::vector<double>& arguments, bool rescale)
      : op_(op),
        params_(std::move(params)),
        moments_(std::move(moments)),
        updates_(check_updates(op, moments_, count, rule, arguments, rescale)) {
    check(params_.size() == moments_.sum.size(), op, "expected params of ", moments_.sum.size(),
          " tensors, as sum has, but got ", params_.size());
    if (params_.empty()) return;
    device_.emplace(op, params_[0]);
    check_here(*device_, {{"params", params_},
                          {"sum", moments_.sum},
                          {"votes", moments_.votes},
                          {"squares", moments_.squares},
                          {"logs", moments_.logs},
                          {"voters", moments_.voters}});
    for (size_t i = 0; i < params_.size(); ++i) {
      const Dtype dtype = check_dtype(op, "params", params_[i], i);
      dtypes_.push_back(dtype);
      check_writable(op, "params", i, params_[i]);
      if (!same_shape(params_[i], moments_.sum[i])) {
        fail(op, "expected sum[", i, "] of shape ", shape_text(params_[i]), ", as params[", i,
             "] has, but got ", shape_text(moments_.sum[i]));
      }
      const Dtype sum_dtype = updates_[i].sum_dtype;
      if ((dtype == Dtype::float64) != (sum_dtype == Dtype::float64)) {
        fail(op, "expected sum[", i, "] of ", dtype == Dtype::float64 ? "float64" : "float32",
             " for params[", i, "], but got ", dtype_text(moments_.sum[i].scalar_type()));
      }
    }
  }

  // Takes a factor of the updates: one float64 beside the parameters, for which no host waits.
  void scale(const std::optional<Tensor>& grad_scale) {
    if (!grad_scale) return;
    if (grad_scale->dim() != 0 || grad_scale->scalar_type() != ScalarType::Double) {
      fail(op_, "expected grad_scale of one float64, shape (), but got shape ",
           shape_text(*grad_scale), " of ", dtype_text(*grad_scale));
    }
    if (device_) device_->check_here("grad_scale", -1, *grad_scale);
    for (Update& update : updates_) {
      update.grad_scale = static_cast<const double*>(grad_scale->const_data_ptr());
    }
  }

  // Adds a list of state in the wide type; `optional`: it may be empty.
  void state(const char* name, Tensors& list, bool optional = false) {
    check(list.size() == params_.size() || (optional && list.empty()), op_, "expected ", name,
          " of ", params_.size(), " tensors, as params has, but got ", list.size());
    if (!list.empty()) check_here(*device_, {{name, list}});
    for (size_t i = 0; i < list.size(); ++i) {
      if (!same_shape(list[i], params_[i])) {
        fail(op_, "expected ", name, "[", i, "] of shape ", shape_text(params_[i]), ", but got ",
             shape_text(list[i]));
      }
      if (list[i].scalar_type() != wide_type(dtypes_[i])) {
        fail(op_, "expected ", name, "[", i, "] of dtype ", dtype_text(wide_type(dtypes_[i])),
             ", but got ", dtype_text(list[i]));
      }
      check_writable(op_, name, i, list[i]);
    }
    states_.push_back(&list);
  }

  // Takes the step counts: 0-dim float32 tensors beside the parameters, as in torch.optim. Counts
  // this step, unless the device does.
  void count(Tensors& steps) {
    check(steps.size() == params_.size(), op_, "expected steps of ", params_.size(),
          " tensors, as params has, but got ", steps.size());
    if (!steps.empty()) check_here(*device_, {{"steps", steps}});
    for (size_t i = 0; i < steps.size(); ++i) {
      if (steps[i].numel() != 1 || steps[i].scalar_type() != ScalarType::Float) {
        fail(op_, "expected steps[", i, "] of one float32, but got shape ", shape_text(steps[i]),
             " of ", dtype_text(steps[i]));
      }
    }
    for (Tensor& step : steps) {
      steps_.push_back(static_cast<float*>(step.mutable_data_ptr()));
      if constexpr (!Device::kCountsSteps) *steps_.back() += 1;
    }
  }

  // The bias correction 1 - beta^step; 1 where the device counts steps, which then computes it.
  double correction(double beta, size_t index) const {
    if constexpr (Device::kCountsSteps) return 1;
    return correction_of(beta, static_cast<double>(*steps_[index]));
  }
  float* step(size_t index) const { return Device::kCountsSteps ? steps_[index] : nullptr; }

  // Runs make_task(i) for all parameters; what all steps have in common is filled in here.
  template <typename MakeTask>
  void run(const MakeTask& make_task) {
    if (params_.empty()) return;
    Aligned aligned;
    for (size_t i = 0; i < params_.size(); ++i) {
      std::vector<Tensor*> written = {&params_[i]};
      for (Tensors* list : states_) {
        if (!list->empty()) written.push_back(&(*list)[i]);
      }
      aligned.align(written, moments_.tensors(i));
    }
    set_moments(updates_, moments_);
    std::vector<decltype(make_task(size_t{0}))> tasks;
    for (size_t i = 0; i < params_.size(); ++i) {
      tasks.push_back(make_task(i));
      tasks[i].update = updates_[i];
      tasks[i].param = params_[i].mutable_data_ptr();
      tasks[i].dtype = dtypes_[i];
    }
    andmask::run(*device_, tasks);
    aligned.copy_back();
  }

 private:
  const char* op_;
  Tensors params_;
  MomentLists moments_;
  std::vector<Update> updates_;
  std::optional<Device> device_;
  std::vector<Dtype> dtypes_;
  std::vector<Tensors*> states_;
  std::vector<float*> steps_;
};

template <typename Device>
void sgd_step(Tensors params, Tensors momentum_buffers, Tensors sum, Tensors votes, Tensors squares,
              Tensors logs, Tensors voters, int64_t count, std::string rule,
              std::vector<double> arguments, bool rescale, double lr, double momentum,
              double dampening, double weight_decay, bool decoupled_weight_decay, bool nesterov,
              bool maximize, bool first_step, std::optional<Tensor> grad_scale) {
  const char* const op = "andmask::_sgd_step_";
  Step<Device> step(op, params, {sum, votes, squares, logs, voters}, count, rule, arguments,
                    rescale);
  step.scale(grad_scale);
  step.state("momentum_buffers", momentum_buffers, /*optional=*/momentum == 0);
  step.run([&](size_t i) {
    return SgdTask{.momentum_buffer = pointer(momentum_buffers, i),
                   .lr = lr,
                   .momentum = momentum,
                   .dampening = dampening,
                   .weight_decay = weight_decay,
                   .decoupled_weight_decay = decoupled_weight_decay,
                   .nesterov = nesterov,
                   .maximize = maximize,
                   .first = first_step};
  });
}

template <typename Device>
void adam_step(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
               Tensors steps, Tensors sum, Tensors votes, Tensors squares, Tensors logs,
               Tensors voters, int64_t count, std::string rule, std::vector<double> arguments,
               bool rescale, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool decoupled_weight_decay, bool maximize, std::optional<Tensor> grad_scale) {
  const char* const op = "andmask::_adam_step_";
  check_beta(op, "beta1", beta1);
  check_beta(op, "beta2", beta2);
  Step<Device> step(op, params, {sum, votes, squares, logs, voters}, count, rule, arguments,
                    rescale);
  step.scale(grad_scale);
  step.state("exp_avgs", exp_avgs);
  step.state("exp_avg_sqs", exp_avg_sqs);
  step.state("max_exp_avg_sqs", max_exp_avg_sqs, /*optional=*/true);
  step.count(steps);
  step.run([&](size_t i) {
    return AdamTask{.exp_avg = pointer(exp_avgs, i),
                    .exp_avg_sq = pointer(exp_avg_sqs, i),
                    .max_exp_avg_sq = pointer(max_exp_avg_sqs, i),
                    .correction1 = step.correction(beta1, i),
                    .correction2 = step.correction(beta2, i),
                    .lr = lr,
                    .beta1 = beta1,
                    .beta2 = beta2,
                    .eps = eps,
                    .weight_decay = weight_decay,
                    .decoupled_weight_decay = decoupled_weight_decay,
                    .maximize = maximize,
                    .step = step.step(i)};
  });
}

template <typename Device>
void temporal_adam_step(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors sign_avgs,
                        Tensors steps, Tensors grads, std::optional<double> tau,
                        std::optional<double> significance, double lr, double beta1, double beta2,
                        double beta3, double eps, double weight_decay, bool decoupled_weight_decay,
                        bool maximize, bool bias_correction) {
  const char* const op = "andmask::_temporal_adam_step_";
  check(tau.has_value() != significance.has_value(), op,
        "expected one of tau and significance, but got ", tau ? "both" : "neither");
  check_tau(op, tau.value_or(0));
  check_number(op, "significance", significance.value_or(.5),
               !significance || (*significance > 0 && *significance < 1), "in (0, 1)");
  check_beta(op, "beta1", beta1);
  check_beta(op, "beta2", beta2);
  check_beta(op, "beta3", beta3);
  const std::vector<double> none;
  Step<Device> step(op, params, {grads, {}, {}, {}, {}}, 1, "mean", none, false);
  step.state("exp_avgs", exp_avgs);
  step.state("exp_avg_sqs", exp_avg_sqs);
  step.state("sign_avgs", sign_avgs);
  step.count(steps);
  step.run([&](size_t i) {
    const auto correction = [&](double beta) {
      return bias_correction ? step.correction(beta, i) : 1;
    };
    const AdamTask adam{.exp_avg = pointer(exp_avgs, i),
                        .exp_avg_sq = pointer(exp_avg_sqs, i),
                        .correction1 = correction(beta1),
                        .correction2 = correction(beta2),
                        .lr = lr,
                        .beta1 = beta1,
                        .beta2 = beta2,
                        .eps = eps,
                        .weight_decay = weight_decay,
                        .decoupled_weight_decay = decoupled_weight_decay,
                        .maximize = maximize,
                        .step = step.step(i)};
    return TemporalAdamTask{adam,
                            pointer(sign_avgs, i),
                            beta3,
                            correction(beta3),
                            tau.value_or(0),
                            bias_correction,
                            significance.value_or(0),
                            step.correction(beta3, i)};
  });
}

}  // namespace andmask
