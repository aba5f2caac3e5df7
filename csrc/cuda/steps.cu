#include "kernels/steps.h"

#include <array>
#include <vector>

#include "fill_tables.h"
#include "kept.h"
#include "types.h"

namespace andmask {
namespace {

using Indices = std::vector<int64_t>;

// Prepares the rule of all updates, and points them to the thresholds of its test.
RuleCall rule_call(const Stream& stream, std::vector<Update>& updates) {
  const Update& first = updates[0];
  double arguments[kMostArguments] = {};
  std::copy_n(first.arguments, rule_arguments(first.rule, MomentRules()), arguments);
  return RuleCall({arguments, first.count, first.test}, first.rule,
                  set_thresholds(stream, updates));
}

UpdateSource source_of(const Update& update) {
  return {update.moments, update.sum_dtype, update.thresholds};
}

bool packs_source(const Update& update, int width) {
  const MomentArrays& moments = update.moments;
  const int64_t wide = update.sum_dtype == Dtype::float64 ? 8 : 4;
  return packs(moments.sum, width, item_size(update.sum_dtype)) &&
         packs(moments.squares, width, wide) && packs(moments.logs, width, wide) &&
         packs(moments.votes, width, moments.vote_bytes) &&
         packs(moments.voters, width, moments.vote_bytes);
}

template <typename F>
SumItem sum_item(const Update& update, int64_t number) {
  return {source_of(update), update.columns, number, packs_source(update, kPackSize<F>)};
}

int64_t chunks_in(const std::vector<SumItem>& items) {
  int64_t chunks = 0;
  for (const SumItem& item : items) chunks += chunks_of(item.size);
  return chunks;
}

// Computes the scales of some tensors in `memory`, by their number.
template <typename F>
void add_scales(const Stream& stream, const std::vector<SumItem>& items, const RuleCall& call,
                double* memory) {
  double* const parts = stream.scratch<double>(chunks_in(items));
  for_tables(items, [&](const KernelTable<SumItem>& table) {
    launch(stream, table.chunks(), FactorBody<F>{table, call, parts});
    launch(stream, table.count, TableDensityBody<SumItem>{table, parts, memory});
  });
}

// Returns device memory for the scales of all tensors. Null: all are 1.
double* scale_memory(const Stream& stream, const Update& first, size_t tensors) {
  return first.rescale ? stream.scratch<double>(static_cast<int64_t>(tensors)) : nullptr;
}

// Writes the squared norms of the chunks of all updates of the wide type F to `parts`. Returns
// their number.
template <typename F>
int64_t add_squared_norms(const Stream& stream, const std::vector<Update>& updates,
                          const RuleCall& call, double* scales, double* parts) {
  std::vector<SumItem> items;
  for (size_t i = 0; i < updates.size(); ++i) {
    const bool wide = updates[i].sum_dtype == Dtype::float64;
    if (wide == (sizeof(F) == sizeof(double))) {
      items.push_back(sum_item<F>(updates[i], static_cast<int64_t>(i)));
    }
  }
  if (scales) add_scales<F>(stream, items, call, scales);
  return for_tables(items, [&](const KernelTable<SumItem>& table) {
    launch(stream, table.chunks(), SquaredNormBody<F>{table, call, scales, parts});
  });
}

// The target of a task and its type.
void* target_of(const ResolveTask& task) { return task.out; }
Dtype dtype_of(const ResolveTask& task) { return task.update.sum_dtype; }
template <typename Task>
void* target_of(const Task& task) {
  return task.param;
}
template <typename Task>
Dtype dtype_of(const Task& task) {
  return task.dtype;
}

// Launches the steps of all tasks, type by type. make_steps(F(), indices) returns the Steps of some
// tasks (kernels/steps.h), and states_of(task) the state of one tensor.
template <typename Task, typename MakeSteps, typename StatesOf>
void run_steps(const Stream& stream, const std::vector<Task>& tasks, const MakeSteps& make_steps,
               const StatesOf& states_of) {
  if (tasks.empty()) return;
  std::vector<Update> updates;
  for (const Task& task : tasks) updates.push_back(task.update);
  const RuleCall call = rule_call(stream, updates);
  const Update& first = updates[0];
  double* const scale = scale_memory(stream, first, tasks.size());
  for (int kind = 0; kind < kDtypes; ++kind) {
    with_type(static_cast<Dtype>(kind), [&](auto type) {
      using T = typename decltype(type)::type;
      using F = accumulate_t<T>;
      Indices chosen;
      for (size_t i = 0; i < tasks.size(); ++i) {
        if (static_cast<int>(dtype_of(tasks[i])) == kind) chosen.push_back(static_cast<int64_t>(i));
      }
      if (chosen.empty()) return;
      if (scale) {
        std::vector<SumItem> sums;
        for (int64_t i : chosen) sums.push_back(sum_item<F>(updates[i], i));
        add_scales<F>(stream, sums, call, scale);
      }
      const auto steps = make_steps(F(), chosen);
      using Body = StepBody<T, std::remove_const_t<decltype(steps)>>;
      constexpr int width = Body::kWidth;
      std::vector<StepItem> items;
      for (int64_t i : chosen) {
        const Update& update = updates[i];
        StepItem item{};
        item.source = source_of(update);
        item.target = target_of(tasks[i]);
        item.number = i;
        item.size = update.columns;
        item.packed = packs_source(update, width) && packs(item.target, width, sizeof(T));
        int k = 0;
        for (void* state : states_of(tasks[i])) {
          item.state[k++] = state;
          item.packed = item.packed && packs(state, width, sizeof(F));
        }
        items.push_back(item);
      }
      for_tables(items, [&](const KernelTable<StepItem>& table) {
        launch(stream, table.chunks(), Body{table, call, scale, first.grad_scale, steps});
      });
    });
  }
}

// Counts a step of each chosen tensor, and computes the constants of its rule in device memory.
template <typename F, typename Task>
auto* count_steps(const Stream& stream, const std::vector<Task>& tasks, const Indices& chosen) {
  using Rule = decltype(rule_of(tasks[0], F()));
  Rule* const rules = stream.scratch<Rule>(static_cast<int64_t>(tasks.size()));
  std::vector<CountItem> items;
  for (int64_t i : chosen) items.push_back({tasks[i].step, i});
  for_tables(items, [&](const KernelTable<CountItem>& table) {
    using Body = CountBody<Task, Rule, F>;
    launch(stream, (table.count + Body::kThreads - 1) / Body::kThreads,
           Body{table, tasks[0], rules});
  });
  return rules;
}

}  // namespace

void run(const Stream& stream, const std::vector<ResolveTask>& tasks) {
  run_steps(
      stream, tasks, [](auto, const Indices&) { return StoreUpdates(); },
      [](const ResolveTask&) { return std::array<void*, 0>(); });
}

void run(const Stream& stream, const SquaredNormTask& task) {
  std::vector<Update> updates = task.updates;
  const RuleCall call = rule_call(stream, updates);
  double* const scales = scale_memory(stream, updates[0], updates.size());
  int64_t chunks = 0;
  for (const Update& update : updates) chunks += chunks_of(update.columns);
  double* const parts = stream.scratch<double>(chunks);
  const int64_t narrow = add_squared_norms<float>(stream, updates, call, scales, parts);
  const int64_t wide = add_squared_norms<double>(stream, updates, call, scales, parts + narrow);
  launch(stream, 1, TotalBody{parts, narrow + wide, task.out});
}

void run(const Stream& stream, const std::vector<SgdTask>& tasks) {
  run_steps(
      stream, tasks,
      [&](auto wide, const Indices&) {
        using F = decltype(wide);
        return SgdSteps<F>{sgd_of<F>(tasks[0]), tasks[0].first};
      },
      [](const SgdTask& task) { return std::array{task.momentum_buffer}; });
}

void run(const Stream& stream, const std::vector<AdamTask>& tasks) {
  run_steps(
      stream, tasks,
      [&](auto wide, const Indices& chosen) {
        using F = decltype(wide);
        return AdamSteps<F>{count_steps<F>(stream, tasks, chosen)};
      },
      [](const AdamTask& task) {
        return std::array{task.exp_avg, task.exp_avg_sq, task.max_exp_avg_sq};
      });
}

void run(const Stream& stream, const std::vector<TemporalAdamTask>& tasks) {
  run_steps(
      stream, tasks,
      [&](auto wide, const Indices& chosen) {
        using F = decltype(wide);
        return TemporalAdamSteps<F>{count_steps<F>(stream, tasks, chosen)};
      },
      [](const TemporalAdamTask& task) {
        return std::array{task.exp_avg, task.exp_avg_sq, task.sign_avg};
      });
}

}  // namespace andmask
