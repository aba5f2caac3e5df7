#include "steps.h"

#include "../../math/steps.h"
#include "load.h"

namespace andmask {
namespace {

template <typename T, typename F>
void round_columns(const F* __restrict wide, int64_t columns, T* __restrict out) {
  for (int64_t i = 0; i < columns; ++i) out[i] = Rounder<T>::from(static_cast<double>(wide[i]));
}

// Runs `body(params)` on `columns` parameters in the wide type, in place if they have it.
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
  const Sgd<F> rule = sgd_of<F>(task);
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
        params[i] = rule.step(params[i], grads[i], exp_avg[i], exp_avg_sq[i]);
      }
      return;
    }
    F* const __restrict largest = static_cast<F*>(task.max_exp_avg_sq) + begin;
    for (int64_t i = 0; i < columns; ++i) {
      params[i] = rule.step(params[i], grads[i], exp_avg[i], exp_avg_sq[i], largest[i]);
    }
  });
}

template <typename T>
void temporal_adam(const TemporalAdamTask& task, const void* update, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  const TemporalAdam<F> rule = temporal_adam_of<F>(task);
  const F* const __restrict grads = static_cast<const F*>(update);
  F* const __restrict exp_avg = static_cast<F*>(task.exp_avg) + begin;
  F* const __restrict exp_avg_sq = static_cast<F*>(task.exp_avg_sq) + begin;
  F* const __restrict sign_avg = static_cast<F*>(task.sign_avg) + begin;
  const int64_t columns = end - begin;
  with_params<T>(task.param, begin, columns, [&](F* __restrict params) {
    for (int64_t i = 0; i < columns; ++i) {
      params[i] = rule.step(params[i], grads[i], exp_avg[i], exp_avg_sq[i], sign_avg[i]);
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
