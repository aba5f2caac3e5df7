// Kernel bodies of resolve and of the optimizer steps, for a table of tensors. One pass over memory
// computes the update of a rule and stores it or makes an optimizer step with it.
#pragma once

#include "../../math/steps.h"
#include "updates.h"

namespace andmask {

struct StepItem {
  UpdateSource source;
  void* target;    // parameters, or where updates go
  void* state[3];  // in the wide type; null where a step has none
  int64_t number;  // of the tensor among the tasks
  int64_t size;
  bool packed;
};

// ---- steps ----
// of(item) returns the rule of one tensor. The rule's updated_param(param, update, states, i)
// returns the new value of the parameter, whose state is states[0][i], states[1][i] and so on.

struct StoreUpdates {
  static constexpr bool kReadsTarget = false;
  static constexpr int kStates = 0;

  ANDMASK_METHOD const StoreUpdates& of(const StepItem&) const { return *this; }

  template <typename F, typename States>
  ANDMASK_METHOD F updated_param(F, F update, States&, int) const {
    return update;
  }
};

template <typename F>
struct SgdSteps {
  static constexpr bool kReadsTarget = true;
  static constexpr int kStates = 1;

  struct Rule {
    Sgd<F> sgd;
    bool momentum, first;

    template <typename States>
    ANDMASK_METHOD F updated_param(F param, F update, States& states, int i) const {
      return !momentum ? sgd.plain(param, update)
             : first   ? sgd.template step<true>(param, update, states[0][i])
                       : sgd.template step<false>(param, update, states[0][i]);
    }
  };

  Sgd<F> sgd;
  bool first;

  ANDMASK_METHOD Rule of(const StepItem& item) const {
    return {sgd, item.state[0] != nullptr, first};
  }
};

template <typename F>
struct AdamSteps {
  static constexpr bool kReadsTarget = true;
  static constexpr int kStates = 3;

  struct Rule {
    Adam<F> adam;
    bool amsgrad;

    template <typename States>
    ANDMASK_METHOD F updated_param(F param, F update, States& states, int i) const {
      return amsgrad ? adam.step(param, update, states[0][i], states[1][i], states[2][i])
                     : adam.step(param, update, states[0][i], states[1][i]);
    }
  };

  const Adam<F>* rules;  // [tensors]

  ANDMASK_METHOD Rule of(const StepItem& item) const {
    return {rules[item.number], item.state[2] != nullptr};
  }
};

template <typename F>
struct TemporalAdamSteps {
  static constexpr bool kReadsTarget = true;
  static constexpr int kStates = 3;

  struct Rule {
    TemporalAdam<F> adam;

    template <typename States>
    ANDMASK_METHOD F updated_param(F param, F update, States& states, int i) const {
      return adam.step(param, update, states[0][i], states[1][i], states[2][i]);
    }
  };

  const TemporalAdam<F>* rules;  // [tensors]

  ANDMASK_METHOD Rule of(const StepItem& item) const { return {rules[item.number]}; }
};

// ---- the kernels ----

// T is the type of the target. With state, packs fill 16 bytes of the state's type: most of the
// traffic is state, and narrower packs leave registers for more threads.
template <typename T, typename Steps>
struct StepBody {
  static constexpr int kThreads = kTableThreads;
  using F = accumulate_t<T>;
  static constexpr int kWidth = Steps::kStates > 0 ? kPackSize<F> : kPackSize<T>;

  KernelTable<StepItem> table;
  RuleCall call;
  const double* scales;      // [tensors]; null: 1
  const double* grad_scale;  // of all updates; null: 1
  Steps steps;

  template <typename At>
  ANDMASK_METHOD void update(const StepItem& item, const At& at) const {
    T* const target = static_cast<T*>(item.target);
    // All loads are on their way before the first is waited for.
    Pack<T, kWidth> stored;
    if constexpr (Steps::kReadsTarget) stored = at.template get<T>(target);
    Pack<F, kWidth> states[Steps::kStates + 1] = {};
#pragma unroll
    for (int k = 0; k < Steps::kStates; ++k) {
      if (item.state[k]) states[k] = at.template get<F>(static_cast<const F*>(item.state[k]));
    }
    F updates[kWidth];
    get_updates<F, kWidth>(at, item.source, call, scale_of<F>(scales, item.number), updates);
    if (grad_scale) {
      const F factor = static_cast<F>(*grad_scale);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) updates[i] *= factor;
    }
    const auto& rule = steps.of(item);
    F params[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const F param = Steps::kReadsTarget ? widen(stored[i]) : F(0);
      params[i] = rule.updated_param(param, updates[i], states, i);
    }
#pragma unroll
    for (int k = 0; k < Steps::kStates; ++k) {
      if (item.state[k]) at.put(static_cast<F*>(item.state[k]), states[k]);
    }
    Pack<T, kWidth> rounded;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      // A float32 or float64 parameter is stored as it is, its NaN too.
      if constexpr (Steps::kReadsTarget && sizeof(T) == sizeof(F)) {
        rounded[i] = params[i];
      } else {
        rounded[i] = Rounder<T>::from(static_cast<double>(params[i]));
      }
    }
    at.put(target, rounded);
  }

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    const int64_t chunk = table.first_chunk[0] + index.block;
    const int64_t entry = table.item_of(chunk);
    const StepItem& item = table.items[entry];
    for_tiles<kWidth>(
        item, chunk - table.first_chunk[entry], index.thread,
        [&](const Tile<kWidth>& tile) { tile.at([&](const auto& at) { update(item, at); }); });
  }
};

// One thread for each tensor counts the step, and computes the constants of the rule that depend on
// it.
struct CountItem {
  float* step;
  int64_t number;
  int64_t size = 1;  // a chunk of its own
  bool packed = false;
};

ANDMASK_INLINE Adam<float> rule_of(const AdamTask& task, float) { return adam_of<float>(task); }
ANDMASK_INLINE Adam<double> rule_of(const AdamTask& task, double) { return adam_of<double>(task); }

template <typename F>
ANDMASK_INLINE TemporalAdam<F> rule_of(const TemporalAdamTask& task, F) {
  return temporal_adam_of<F>(task);
}

ANDMASK_INLINE void correct(AdamTask& task, double steps) {
  task.correction1 = correction_of(task.beta1, steps);
  task.correction2 = correction_of(task.beta2, steps);
}

ANDMASK_INLINE void correct(TemporalAdamTask& task, double steps) {
  task.correction1 = task.correction2 = task.correction3 = 1;
  task.sign_correction = correction_of(task.beta3, steps);
  if (!task.bias_correction) return;
  correct(static_cast<AdamTask&>(task), steps);
  task.correction3 = correction_of(task.beta3, steps);
}

template <typename Task, typename Rule, typename F>
struct CountBody {
  static constexpr int kThreads = 32;

  KernelTable<CountItem> table;
  Task task;    // the constants that all tensors share
  Rule* rules;  // [tensors]

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    const int64_t entry = index.in_grid(kThreads);
    if (entry >= table.count) return;
    const CountItem& item = table.items[entry];
    const float steps = *item.step + 1;
    *item.step = steps;
    Task corrected = task;
    correct(corrected, static_cast<double>(steps));
    rules[item.number] = rule_of(corrected, F());
  }
};

}  // namespace andmask
