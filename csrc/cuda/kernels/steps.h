// Kernel bodies of resolve and of the optimizer steps, for a list of tensors: the update of a rule,
// and what becomes of it, in one pass over memory.
#pragma once

#include "../../math/steps.h"
#include "updates.h"

namespace andmask {

struct StepItem {
  UpdateSource source;
  void* target;    // parameters, or where updates go
  void* state[3];  // in the wide type; null where a step has none
  int64_t number;  // of the tensor, in the caller's list
  int64_t size;
  bool packed;
};

// State of `width` coordinates, read and written back.
template <typename F, int width, typename At>
struct State {
  const At& at;
  F* memory;
  Pack<F, width> values;

  ANDMASK_METHOD State(const At& where, void* state)
      : at(where), memory(static_cast<F*>(state)), values(where.template get<F>(memory)) {}
  ANDMASK_METHOD F& operator[](int i) { return values[i]; }
  ANDMASK_METHOD void write() const { at.put(memory, values); }
};

// ---- what becomes of an update ----
// apply(item, at, params, updates) moves `width` parameters.

struct StoreUpdates {
  static constexpr bool kReadsTarget = false;

  template <typename F, int width, typename At>
  ANDMASK_METHOD void apply(const StepItem&, const At&, F* params, const F* updates) const {
#pragma unroll
    for (int i = 0; i < width; ++i) params[i] = updates[i];
  }
};

template <typename F_>
struct SgdSteps {
  static constexpr bool kReadsTarget = true;

  Sgd<F_> rule;
  bool first;

  template <typename F, int width, typename At>
  ANDMASK_METHOD void apply(const StepItem& item, const At& at, F* params, const F* updates) const {
    if (!item.state[0]) {
#pragma unroll
      for (int i = 0; i < width; ++i) params[i] = rule.plain(params[i], updates[i]);
      return;
    }
    State<F, width, At> buffer(at, item.state[0]);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      params[i] = first ? rule.template step<true>(params[i], updates[i], buffer[i])
                        : rule.template step<false>(params[i], updates[i], buffer[i]);
    }
    buffer.write();
  }
};

template <typename F_>
struct AdamSteps {
  static constexpr bool kReadsTarget = true;

  const Adam<F_>* rules;  // [tensors]

  template <typename F, int width, typename At>
  ANDMASK_METHOD void apply(const StepItem& item, const At& at, F* params, const F* updates) const {
    const Adam<F> rule = rules[item.number];
    State<F, width, At> exp_avg(at, item.state[0]);
    State<F, width, At> exp_avg_sq(at, item.state[1]);
    if (item.state[2]) {
      State<F, width, At> largest(at, item.state[2]);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        params[i] = rule.step(params[i], updates[i], exp_avg[i], exp_avg_sq[i], largest[i]);
      }
      largest.write();
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        params[i] = rule.step(params[i], updates[i], exp_avg[i], exp_avg_sq[i]);
      }
    }
    exp_avg.write();
    exp_avg_sq.write();
  }
};

template <typename F_>
struct TemporalAdamSteps {
  static constexpr bool kReadsTarget = true;

  const TemporalAdam<F_>* rules;  // [tensors]

  template <typename F, int width, typename At>
  ANDMASK_METHOD void apply(const StepItem& item, const At& at, F* params, const F* updates) const {
    const TemporalAdam<F> rule = rules[item.number];
    State<F, width, At> exp_avg(at, item.state[0]);
    State<F, width, At> exp_avg_sq(at, item.state[1]);
    State<F, width, At> sign_avg(at, item.state[2]);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      params[i] = rule.step(params[i], updates[i], exp_avg[i], exp_avg_sq[i], sign_avg[i]);
    }
    exp_avg.write();
    exp_avg_sq.write();
    sign_avg.write();
  }
};

// ---- the kernels ----

// T is the type of the target.
template <typename T, typename Steps>
struct StepBody {
  static constexpr int kThreads = kListThreads;
  static constexpr int kWidth = kPackSize<T>;
  using F = accumulate_t<T>;

  List<StepItem> list;
  RuleCall call;
  const double* scales;  // [tensors]; null: 1
  Steps steps;

  template <typename At>
  ANDMASK_METHOD void move(const StepItem& item, const At& at) const {
    T* const target = static_cast<T*>(item.target);
    F params[kWidth];
    if constexpr (Steps::kReadsTarget) {
      const Pack<T, kWidth> stored = at.template get<T>(target);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) params[i] = widen(stored[i]);
    }
    F updates[kWidth];
    const F scale = scales ? static_cast<F>(scales[item.number]) : F(1);
    get_updates<F, kWidth>(at, item.source, call, scale, updates);
    steps.template apply<F, kWidth>(item, at, params, updates);
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

  ANDMASK_METHOD void operator()(const Place& place) const {
    const int64_t chunk = list.first_chunk[0] + place.block;
    const int64_t index = list.item_of(chunk);
    const StepItem& item = list.items[index];
    for_tiles<kWidth>(
        item, chunk - list.first_chunk[index], place.thread,
        [&](const Tile<kWidth>& tile) { tile.at([&](const auto& at) { move(item, at); }); });
  }
};

// One thread for each tensor counts the step, and makes the constants of the rule that depend on
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
  task.adam.correction1 = task.adam.correction2 = task.correction3 = 1;
  if (!task.bias_correction) return;
  correct(task.adam, steps);
  task.correction3 = correction_of(task.beta3, steps);
}

template <typename Task, typename Rule, typename F>
struct CountBody {
  static constexpr int kThreads = 32;

  List<CountItem> list;
  Task task;    // the constants that all tensors share
  Rule* rules;  // [tensors]

  ANDMASK_METHOD void operator()(const Place& place) const {
    const int64_t index = place.index(kThreads);
    if (index >= list.count) return;
    const CountItem& item = list.items[index];
    const float steps = *item.step + 1;
    *item.step = steps;
    Task own = task;
    correct(own, static_cast<double>(steps));
    rules[item.number] = rule_of(own, F());
  }
};

}  // namespace andmask
