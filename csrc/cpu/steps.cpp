#include "kernels/steps.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "resolver.h"

namespace andmask {
namespace {

void check_number(const char* op, const char* name, double value, bool holds,
                  const char* expected) {
  check(holds, op, "expected ", name, " ", expected, ", but got ", value);
}

void check_beta(const char* op, const char* name, double value) {
  check_number(op, name, value, value >= 0 && value < 1, "in [0, 1)");
}

// Parameters, the moments that move them, and their state. Checks, aligns, and runs one pass.
class Step {
 public:
  Step(const char* op, Tensors params, MomentLists moments, int64_t count, const std::string& rule,
       const std::vector<double>& arguments, bool rescale)
      : op_(op),
        params_(std::move(params)),
        moments_(std::move(moments)),
        resolver_(op, moments_, count, rule, arguments, rescale) {
    check(params_.size() == moments_.sum.size(), op, "expected params of ", moments_.sum.size(),
          " tensors, as sum has, but got ", params_.size());
    for (size_t i = 0; i < params_.size(); ++i) {
      const Dtype dtype = check_dtype(op, "params", params_[i], i);
      dtypes_.push_back(dtype);
      check_writable(op, "params", i, params_[i]);
      if (!same_shape(params_[i], moments_.sum[i])) {
        fail(op, "expected sum[", i, "] of shape ", shape_text(params_[i]), ", as params[", i,
             "] has, but got ", shape_text(moments_.sum[i]));
      }
      if ((dtype == Dtype::float64) != (resolver_.dtype(i) == Dtype::float64)) {
        fail(op, "expected sum[", i, "] of ", dtype == Dtype::float64 ? "float64" : "float32",
             " for params[", i, "], but got ",
             torch::headeronly::toString(moments_.sum[i].scalar_type()));
      }
    }
  }

  // State of the wide type; `optional`: the list may be empty.
  Tensors& state(const char* name, Tensors& list, bool optional = false) {
    check(list.size() == params_.size() || (optional && list.empty()), op_, "expected ", name,
          " of ", params_.size(), " tensors, as params has, but got ", list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      if (!same_shape(list[i], params_[i])) {
        fail(op_, "expected ", name, "[", i, "] of shape ", shape_text(params_[i]), ", but got ",
             shape_text(list[i]));
      }
      const ScalarType wide = dtypes_[i] == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
      if (list[i].scalar_type() != wide) {
        fail(op_, "expected ", name, "[", i, "] of dtype ", torch::headeronly::toString(wide),
             ", but got ", torch::headeronly::toString(list[i].scalar_type()));
      }
      check_writable(op_, name, i, list[i]);
    }
    states_.push_back(&list);
    return list;
  }

  // Counts this step in 0-dim float32 tensors on the CPU, as torch.optim keeps them.
  std::vector<double> count(Tensors& steps) {
    check(steps.size() == params_.size(), op_, "expected steps of ", params_.size(),
          " tensors, as params has, but got ", steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      if (steps[i].numel() != 1 || steps[i].scalar_type() != ScalarType::Float) {
        fail(op_, "expected steps[", i, "] of one float32, but got shape ", shape_text(steps[i]),
             " of ", torch::headeronly::toString(steps[i].scalar_type()));
      }
    }
    std::vector<double> counted;
    for (Tensor& step : steps) {
      float* const value = static_cast<float*>(step.mutable_data_ptr());
      *value += 1;
      counted.push_back(static_cast<double>(*value));
    }
    return counted;
  }

  void align() {
    for (size_t i = 0; i < params_.size(); ++i) {
      std::vector<Tensor*> written = {&params_[i]};
      for (Tensors* list : states_) {
        if (!list->empty()) written.push_back(&(*list)[i]);
      }
      aligned_.align(written, moments_.tensors(i));
    }
  }

  void* param(int64_t index) const { return params_[index].mutable_data_ptr(); }

  int64_t size() const { return static_cast<int64_t>(params_.size()); }

  // Runs kernels[dtype](tasks[i], ...) over all parameters.
  template <typename Task>
  void run(const std::vector<Task>& tasks,
           void (*const (&kernels)[kDtypes])(const Task&, const void*, int64_t, int64_t)) {
    resolver_.run([&](int64_t index, int64_t begin, int64_t end, const void* update) {
      kernels[static_cast<int>(dtypes_[index])](tasks[index], update, begin, end);
    });
    aligned_.copy_back();
  }

 private:
  const char* op_;
  Tensors params_;
  MomentLists moments_;
  Resolver resolver_;
  std::vector<Dtype> dtypes_;
  std::vector<Tensors*> states_;
  Aligned aligned_;
};

void* pointer(const Tensors& list, int64_t index) {
  return list.empty() ? nullptr : list[index].mutable_data_ptr();
}

void sgd_step_cpu(Tensors params, Tensors momentum_buffers, Tensors sum, Tensors votes,
                  Tensors squares, Tensors logs, int64_t count, std::string rule,
                  std::vector<double> arguments, bool rescale, double lr, double momentum,
                  double dampening, double weight_decay, bool decoupled_weight_decay, bool nesterov,
                  bool maximize, bool first_step) {
  const char* const op = "andmask::sgd_step_";
  Step step(op, params, {sum, votes, squares, logs}, count, rule, arguments, rescale);
  step.state("momentum_buffers", momentum_buffers, /*optional=*/momentum == 0);
  step.align();
  std::vector<SgdTask> tasks;
  for (int64_t i = 0; i < step.size(); ++i) {
    tasks.push_back({step.param(i), pointer(momentum_buffers, i), lr, momentum, dampening,
                     weight_decay, decoupled_weight_decay, nesterov, maximize, first_step});
  }
  step.run(tasks, step_kernels(active_isa()).sgd);
}

void adam_step_cpu(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                   Tensors steps, Tensors sum, Tensors votes, Tensors squares, Tensors logs,
                   int64_t count, std::string rule, std::vector<double> arguments, bool rescale,
                   double lr, double beta1, double beta2, double eps, double weight_decay,
                   bool decoupled_weight_decay, bool maximize) {
  const char* const op = "andmask::adam_step_";
  check_beta(op, "beta1", beta1);
  check_beta(op, "beta2", beta2);
  Step step(op, params, {sum, votes, squares, logs}, count, rule, arguments, rescale);
  step.state("exp_avgs", exp_avgs);
  step.state("exp_avg_sqs", exp_avg_sqs);
  step.state("max_exp_avg_sqs", max_exp_avg_sqs, /*optional=*/true);
  const std::vector<double> counted = step.count(steps);
  step.align();
  std::vector<AdamTask> tasks;
  for (int64_t i = 0; i < step.size(); ++i) {
    AdamTask task{};
    task.param = step.param(i);
    task.exp_avg = pointer(exp_avgs, i);
    task.exp_avg_sq = pointer(exp_avg_sqs, i);
    task.max_exp_avg_sq = pointer(max_exp_avg_sqs, i);
    task.correction1 = 1 - std::pow(beta1, counted[i]);
    task.correction2 = 1 - std::pow(beta2, counted[i]);
    task.lr = lr;
    task.beta1 = beta1;
    task.beta2 = beta2;
    task.eps = eps;
    task.weight_decay = weight_decay;
    task.decoupled_weight_decay = decoupled_weight_decay;
    task.maximize = maximize;
    tasks.push_back(task);
  }
  step.run(tasks, step_kernels(active_isa()).adam);
}

void temporal_adam_step_cpu(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs,
                            Tensors sign_avgs, Tensors steps, Tensors grads, double tau, double lr,
                            double beta1, double beta2, double beta3, double eps,
                            double weight_decay, bool decoupled_weight_decay, bool maximize,
                            bool bias_correction) {
  const char* const op = "andmask::temporal_adam_step_";
  check_tau(op, tau);
  check_beta(op, "beta1", beta1);
  check_beta(op, "beta2", beta2);
  check_beta(op, "beta3", beta3);
  const std::vector<double> none;
  Step step(op, params, {grads, {}, {}, {}}, 1, "mean", none, false);
  step.state("exp_avgs", exp_avgs);
  step.state("exp_avg_sqs", exp_avg_sqs);
  step.state("sign_avgs", sign_avgs);
  const std::vector<double> counted = step.count(steps);
  step.align();
  std::vector<TemporalAdamTask> tasks;
  for (int64_t i = 0; i < step.size(); ++i) {
    const auto correction = [&](double beta) {
      return bias_correction ? 1 - std::pow(beta, counted[i]) : 1;
    };
    TemporalAdamTask task{};
    task.adam.param = step.param(i);
    task.adam.exp_avg = pointer(exp_avgs, i);
    task.adam.exp_avg_sq = pointer(exp_avg_sqs, i);
    task.adam.correction1 = correction(beta1);
    task.adam.correction2 = correction(beta2);
    task.adam.lr = lr;
    task.adam.beta1 = beta1;
    task.adam.beta2 = beta2;
    task.adam.eps = eps;
    task.adam.weight_decay = weight_decay;
    task.adam.decoupled_weight_decay = decoupled_weight_decay;
    task.adam.maximize = maximize;
    task.sign_avg = pointer(sign_avgs, i);
    task.beta3 = beta3;
    task.correction3 = correction(beta3);
    task.tau = tau;
    tasks.push_back(task);
  }
  step.run(tasks, step_kernels(active_isa()).temporal_adam);
}

}  // namespace
}  // namespace andmask

STABLE_TORCH_LIBRARY_IMPL(andmask, CPU, m) {
  m.impl("sgd_step_", TORCH_BOX(&andmask::sgd_step_cpu));
  m.impl("adam_step_", TORCH_BOX(&andmask::adam_step_cpu));
  m.impl("temporal_adam_step_", TORCH_BOX(&andmask::temporal_adam_step_cpu));
}
