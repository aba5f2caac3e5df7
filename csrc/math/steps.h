// One step of an optimizer for one coordinate, after torch.optim.
#pragma once

#include "scalar.h"

namespace andmask {

ANDMASK_INLINE float square_root(float value) { return __builtin_sqrtf(value); }

ANDMASK_INLINE double square_root(double value) { return __builtin_sqrt(value); }

// The constants of one tensor and one step. Decay that is not decoupled adds to the gradient.
template <typename F>
struct Decay {
  F direction;  // -1 to maximize
  F coupled;
  F shrink;  // 1 - lr * weight_decay where decoupled, else 1

  ANDMASK_METHOD F gradient(F grad, F param) const { return direction * grad + coupled * param; }
};

template <typename F>
struct Sgd {
  Decay<F> decay;
  F lr, momentum, fresh;  // fresh = 1 - dampening
  bool nesterov;

  // Without momentum.
  ANDMASK_METHOD F plain(F param, F grad) const {
    return param * decay.shrink - lr * decay.gradient(grad, param);
  }

  // `first`: the buffer starts as the gradient itself, without dampening.
  template <bool first>
  ANDMASK_METHOD F step(F param, F grad, F& buffer) const {
    const F gradient = decay.gradient(grad, param);
    buffer = first ? gradient : momentum * buffer + fresh * gradient;
    return param * decay.shrink - lr * (nesterov ? gradient + momentum * buffer : buffer);
  }
};

// Kingma and Ba 2015; decoupled decay: Loshchilov and Hutter 2019; largest: Reddi et al. 2018.
template <typename F>
struct Adam {
  Decay<F> decay;
  F fresh1, beta2, fresh2;  // fresh = 1 - beta
  F size;                   // lr / (1 - beta1^step)
  F inverse_correction;     // 1 / sqrt(1 - beta2^step)
  F eps;

  ANDMASK_METHOD F moved(F param, F exp_avg, F second) const {
    return param * decay.shrink -
           size * (exp_avg / (square_root(second) * inverse_correction + eps));
  }

  ANDMASK_METHOD void average(F param, F grad, F& exp_avg, F& exp_avg_sq) const {
    const F gradient = decay.gradient(grad, param);
    exp_avg += fresh1 * (gradient - exp_avg);
    exp_avg_sq = beta2 * exp_avg_sq + fresh2 * gradient * gradient;
  }
};

// Parascandolo et al. 2021, appendix B.6: signs vote over time. The tolerance makes up for
// rounding, as in `vote_threshold`.
template <typename F>
struct TemporalAdam {
  Adam<F> adam;
  F fresh3;     // 1 - beta3
  F threshold;  // (tau - 1e-6), times 1 - beta3^step with bias correction

  ANDMASK_METHOD F mask(F grad, F& sign_avg) const {
    const F vote = (grad > 0 ? F(1) : F(0)) - (grad < 0 ? F(1) : F(0));
    sign_avg += fresh3 * (vote - sign_avg);
    return (sign_avg < 0 ? -sign_avg : sign_avg) >= threshold ? F(1) : F(0);
  }
};

}  // namespace andmask
