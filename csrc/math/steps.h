// One step of an optimizer for one coordinate, after torch.optim.
#pragma once

#include "../tasks/steps.h"
#include "elementary.h"

namespace andmask {

#if defined(__CUDACC__)
ANDMASK_INLINE float square_root(float value) { return sqrtf(value); }
ANDMASK_INLINE double square_root(double value) { return sqrt(value); }
ANDMASK_INLINE double power(double base, double exponent) { return pow(base, exponent); }
#else
ANDMASK_INLINE float square_root(float value) { return __builtin_sqrtf(value); }
ANDMASK_INLINE double square_root(double value) { return __builtin_sqrt(value); }
ANDMASK_INLINE double power(double base, double exponent) { return __builtin_pow(base, exponent); }
#endif

// The bias correction of a running mean that began at zero.
ANDMASK_INLINE double correction_of(double beta, double steps) { return 1 - power(beta, steps); }

// The constants of one tensor and one step. Decay that is not decoupled adds to the gradient.
template <typename F>
struct Decay {
  F direction;  // -1 to maximize
  F coupled;
  F shrink;  // 1 - lr * weight_decay where decoupled, else 1

  ANDMASK_METHOD F gradient(F grad, F param) const { return direction * grad + coupled * param; }
};

template <typename F, typename Task>
ANDMASK_INLINE Decay<F> decay_of(const Task& task) {
  const bool decoupled = task.decoupled_weight_decay;
  return {task.maximize ? F(-1) : F(1), decoupled ? F(0) : static_cast<F>(task.weight_decay),
          decoupled ? static_cast<F>(1 - task.lr * task.weight_decay) : F(1)};
}

template <typename F>
struct Sgd {
  Decay<F> decay;
  F lr, momentum, one_minus_dampening;
  bool nesterov;

  // The step without momentum.
  ANDMASK_METHOD F plain(F param, F grad) const {
    return param * decay.shrink - lr * decay.gradient(grad, param);
  }

  // `first`: the buffer starts as the gradient itself, without dampening.
  template <bool first>
  ANDMASK_METHOD F step(F param, F grad, F& buffer) const {
    const F gradient = decay.gradient(grad, param);
    buffer = first ? gradient : momentum * buffer + one_minus_dampening * gradient;
    return param * decay.shrink - lr * (nesterov ? gradient + momentum * buffer : buffer);
  }
};

template <typename F>
ANDMASK_INLINE Sgd<F> sgd_of(const SgdTask& task) {
  return {decay_of<F>(task), static_cast<F>(task.lr), static_cast<F>(task.momentum),
          static_cast<F>(1 - task.dampening), task.nesterov};
}

// Kingma and Ba 2015; decoupled decay: Loshchilov and Hutter 2019; `largest`: Reddi et al. 2018.
template <typename F>
struct Adam {
  Decay<F> decay;
  F one_minus_beta1, beta2, one_minus_beta2;
  F step_size;           // lr / (1 - beta1^step)
  F inverse_correction;  // 1 / sqrt(1 - beta2^step)
  F eps;

  ANDMASK_METHOD F updated_param(F param, F exp_avg, F second) const {
    return param * decay.shrink -
           step_size * (exp_avg / (square_root(second) * inverse_correction + eps));
  }

  ANDMASK_METHOD void average(F param, F grad, F& exp_avg, F& exp_avg_sq) const {
    const F gradient = decay.gradient(grad, param);
    exp_avg += one_minus_beta1 * (gradient - exp_avg);
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * gradient * gradient;
  }

  ANDMASK_METHOD F step(F param, F grad, F& exp_avg, F& exp_avg_sq) const {
    average(param, grad, exp_avg, exp_avg_sq);
    return updated_param(param, exp_avg, exp_avg_sq);
  }

  ANDMASK_METHOD F step(F param, F grad, F& exp_avg, F& exp_avg_sq, F& largest) const {
    average(param, grad, exp_avg, exp_avg_sq);
    // The comparison is written so that a NaN of this step is kept.
    largest = largest > exp_avg_sq ? largest : exp_avg_sq;
    return updated_param(param, exp_avg, largest);
  }
};

template <typename F>
ANDMASK_INLINE Adam<F> adam_of(const AdamTask& task) {
  return {decay_of<F>(task),
          static_cast<F>(1 - task.beta1),
          static_cast<F>(task.beta2),
          static_cast<F>(1 - task.beta2),
          static_cast<F>(task.lr / task.correction1),
          static_cast<F>(1 / square_root(task.correction2)),
          static_cast<F>(task.eps)};
}

// Parascandolo et al. 2021, appendix B.6: signs vote over time. The tolerance makes up for
// rounding, as in `vote_threshold`.
template <typename F>
struct TemporalAdam {
  Adam<F> adam;
  F one_minus_beta3;
  F threshold;  // of |sign_avg|

  ANDMASK_METHOD F mask(F grad, F& sign_avg) const {
    const F vote = (grad > 0 ? F(1) : F(0)) - (grad < 0 ? F(1) : F(0));
    sign_avg += one_minus_beta3 * (vote - sign_avg);
    return (sign_avg < 0 ? -sign_avg : sign_avg) >= threshold ? F(1) : F(0);
  }

  ANDMASK_METHOD F step(F param, F grad, F& exp_avg, F& exp_avg_sq, F& sign_avg) const {
    adam.average(param, grad, exp_avg, exp_avg_sq);
    return adam.updated_param(param, exp_avg * mask(grad, sign_avg), exp_avg_sq);
  }
};

// The threshold that an average of fair signs passes with a probability of at most alpha. It is a
// sum of independent signs s_i with the factors (1 - beta) beta^(T - i), whose squares add up to
// v = (1 - beta) / (1 + beta) (1 - beta^2T). Hoeffding's inequality: P(|a| >= x) <= 2 exp(-x^2 /
// 2v).
ANDMASK_INLINE double significant_average(double alpha, double beta, double correction) {
  const double variance = (1 - beta) / (1 + beta) * correction * (2 - correction);
  return square_root(2 * variance * -log_of(alpha / 2));
}

template <typename F>
ANDMASK_INLINE TemporalAdam<F> temporal_adam_of(const TemporalAdamTask& task) {
  const double threshold =
      task.significance > 0
          ? significant_average(task.significance, task.beta3, task.sign_correction)
          : (task.tau - 1e-6) * task.correction3;
  return {adam_of<F>(task), static_cast<F>(1 - task.beta3), static_cast<F>(threshold)};
}

}  // namespace andmask
