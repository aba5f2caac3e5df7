#include "steps.h"

#include "../../math/steps.h"
#include "load.h"

namespace andmask {
namespace {

template <typename F>
Decay<F> decay_of(double lr, double weight_decay, bool decoupled, bool maximize) {
  return {maximize ? F(-1) : F(1), decoupled ? F(0) : static_cast<F>(weight_decay),
          decoupled ? static_cast<F>(1 - lr * weight_decay) : F(1)};
}

template <typename T, typename F>
void round_columns(const F* __restrict wide, int64_t columns, T* __restrict out) {
  for (int64_t i = 0; i < columns; ++i) out[i] = Rounder<T>::from(static_cast<double>(wide[i]));
}

// Runs `body(params)` on `columns` parameters in the wide type, in place where they are.
template <typename T, typename Body>
ANDMASK_INLINE void with_params(void* param, int64_t begin, int64_t columns, const Body& body) {
  using F = accumulate_t<T>;
  T* const stored = static_cast<T*>(param) + begin;
  if constexpr (sizeof(T) == sizeof(F)) {
    body(stored);
  } else {
    alignas(64) F wide[kUpdateBlock];
    widen_columns(stored, columns, wide);
    body(wide);
    round_columns(wide, columns, stored);
  }
}

template <typename T>
void store(const void* update, void* out, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  round_columns(static_cast<const F*>(update), end - begin, static_cast<T*>(out) + begin);
}

template <typename T>
void sgd(const SgdTask& task, const void* update, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  const Sgd<F> rule{
      decay_of<F>(task.lr, task.weight_decay, task.decoupled_weight_decay, task.maximize),
      static_cast<F>(task.lr), static_cast<F>(task.momentum), static_cast<F>(1 - task.dampening),
      task.nesterov};
  const F* const __restrict grads = static_cast<const F*>(update);
  const int64_t columns = end - begin;
  with_params<T>(task.param, begin, columns, [&](F* __restrict params) {
    if (!task.momentum_buffer) {
      for (int64_t i = 0; i < columns; ++i) params[i] = rule.plain(params[i], grads[i]);
      return;
    }
    F* const __restrict buffer = static_cast<F*>(task.momentum_buffer) + begin;
    if (task.first) {
      for (int64_t i = 0; i < columns; ++i) {
        params[i] = rule.template step<true>(params[i], grads[i], buffer[i]);
      }
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        params[i] = rule.template step<false>(params[i], grads[i], buffer[i]);
      }
    }
  });
}

template <typename F>
Adam<F> adam_of(const AdamTask& task) {
  return {decay_of<F>(task.lr, task.weight_decay, task.decoupled_weight_decay, task.maximize),
          static_cast<F>(1 - task.beta1),
          static_cast<F>(task.beta2),
          static_cast<F>(1 - task.beta2),
          static_cast<F>(task.lr / task.correction1),
          static_cast<F>(1 / __builtin_sqrt(task.correction2)),
          static_cast<F>(task.eps)};
}

template <typename T>
void adam(const AdamTask& task, const void* update, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  const Adam<F> rule = adam_of<F>(task);
  const F* const __restrict grads = static_cast<const F*>(update);
  F* const __restrict exp_avg = static_cast<F*>(task.exp_avg) + begin;
  F* const __restrict exp_avg_sq = static_cast<F*>(task.exp_avg_sq) + begin;
  const int64_t columns = end - begin;
  with_params<T>(task.param, begin, columns, [&](F* __restrict params) {
    if (!task.max_exp_avg_sq) {
      for (int64_t i = 0; i < columns; ++i) {
        rule.average(params[i], grads[i], exp_avg[i], exp_avg_sq[i]);
        params[i] = rule.moved(params[i], exp_avg[i], exp_avg_sq[i]);
      }
      return;
    }
    F* const __restrict largest = static_cast<F*>(task.max_exp_avg_sq) + begin;
    for (int64_t i = 0; i < columns; ++i) {
      rule.average(params[i], grads[i], exp_avg[i], exp_avg_sq[i]);
      // Written so that a NaN of this step is taken.
      largest[i] = largest[i] > exp_avg_sq[i] ? largest[i] : exp_avg_sq[i];
      params[i] = rule.moved(params[i], exp_avg[i], largest[i]);
    }
  });
}

template <typename T>
void temporal_adam(const TemporalAdamTask& task, const void* update, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  const TemporalAdam<F> rule{adam_of<F>(task.adam), static_cast<F>(1 - task.beta3),
                             static_cast<F>((task.tau - 1e-6) * task.correction3)};
  const F* const __restrict grads = static_cast<const F*>(update);
  F* const __restrict exp_avg = static_cast<F*>(task.adam.exp_avg) + begin;
  F* const __restrict exp_avg_sq = static_cast<F*>(task.adam.exp_avg_sq) + begin;
  F* const __restrict sign_avg = static_cast<F*>(task.sign_avg) + begin;
  const int64_t columns = end - begin;
  with_params<T>(task.adam.param, begin, columns, [&](F* __restrict params) {
    for (int64_t i = 0; i < columns; ++i) {
      rule.adam.average(params[i], grads[i], exp_avg[i], exp_avg_sq[i]);
      const F mask = rule.mask(grads[i], sign_avg[i]);
      params[i] = rule.adam.moved(params[i], exp_avg[i] * mask, exp_avg_sq[i]);
    }
  });
}

}  // namespace

namespace ANDMASK_ISA {
extern const StepKernels step_kernels = {
    {store<Half>, store<BFloat16>, store<float>, store<double>},
    {sgd<Half>, sgd<BFloat16>, sgd<float>, sgd<double>},
    {adam<Half>, adam<BFloat16>, adam<float>, adam<double>},
    {temporal_adam<Half>, temporal_adam<BFloat16>, temporal_adam<float>, temporal_adam<double>},
};
}  // namespace ANDMASK_ISA

}  // namespace andmask
