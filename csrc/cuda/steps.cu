#include "kernels/steps.h"

#include "launchers.h"
#include "lists.h"
#include "types.h"

namespace andmask {
namespace {

using Indices = std::vector<int64_t>;

// Tensors whose targets have this type.
Indices of_type(const std::vector<Dtype>& dtypes, Dtype wanted) {
  Indices found;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    if (dtypes[i] == wanted) found.push_back(static_cast<int64_t>(i));
  }
  return found;
}

RuleCall rule_call(const UpdateList& list) {
  const ResolveTask& first = list.tasks[0];
  double arguments[kMostArguments] = {};
  std::copy_n(first.arguments, rule_arguments(list.rule, MomentRules()), arguments);
  return RuleCall(arguments, first.count, list.rule);
}

bool packs_source(const ResolveTask& task, int width) {
  const MomentArrays& moments = task.moments;
  const int64_t wide = task.sum_dtype == Dtype::float64 ? 8 : 4;
  return packs(moments.sum, width, item_size(task.sum_dtype)) &&
         packs(moments.squares, width, wide) && packs(moments.logs, width, wide) &&
         packs(moments.votes, width, moments.vote_bytes);
}

// The scales of the chosen tensors, by their number in `list`, in device memory; null: all are 1.
template <typename F>
const double* scales(const Stream& stream, const UpdateList& list, const RuleCall& call,
                     const Indices& chosen, double* memory) {
  if (!list.rescale) return nullptr;
  std::vector<FactorItem> items;
  int64_t chunks = 0;
  for (int64_t i : chosen) {
    const ResolveTask& task = list.tasks[i];
    items.push_back({{task.moments, task.sum_dtype},
                     list.sizes[i],
                     i,
                     packs_source(task, FactorBody<F>::kWidth)});
    chunks += chunks_of(list.sizes[i]);
  }
  double* const parts = stream.scratch<double>(chunks);
  for_lists(items, [&](const List<FactorItem>& some) {
    launch(stream, some.chunks(), FactorBody<F>{some, call, parts});
    launch(stream, some.count, ListDensityBody<FactorItem>{some, parts, memory});
  });
  return memory;
}

// Launches a step for all targets of one type. make(F(), indices) gives what becomes of updates;
// item(index) the target and the state of a tensor.
template <typename MakeSteps, typename MakeItem>
void run(const Stream& stream, const UpdateList& list, const std::vector<Dtype>& dtypes,
         const MakeSteps& make_steps, const MakeItem& make_item) {
  if (list.tasks.empty()) return;
  const RuleCall call = rule_call(list);
  double* const memory =
      list.rescale ? stream.scratch<double>(static_cast<int64_t>(list.tasks.size())) : nullptr;
  for (int kind = 0; kind < kDtypes; ++kind) {
    with_type(static_cast<Dtype>(kind), [&](auto type) {
      using T = typename decltype(type)::type;
      using F = accumulate_t<T>;
      const Indices chosen = of_type(dtypes, static_cast<Dtype>(kind));
      if (chosen.empty()) return;
      const double* const scale = scales<F>(stream, list, call, chosen, memory);
      const auto steps = make_steps(F(), chosen);
      using Body = StepBody<T, std::remove_const_t<decltype(steps)>>;
      constexpr int width = Body::kWidth;
      std::vector<StepItem> items;
      for (int64_t i : chosen) {
        StepItem item = make_item(i);
        item.source = {list.tasks[i].moments, list.tasks[i].sum_dtype};
        item.number = i;
        item.size = list.sizes[i];
        item.packed = packs_source(list.tasks[i], width) && packs(item.target, width, sizeof(T));
        for (const void* state : item.state) {
          item.packed = item.packed && packs(state, width, sizeof(F));
        }
        items.push_back(item);
      }
      for_lists(items, [&](const List<StepItem>& some) {
        launch(stream, some.chunks(), Body{some, call, scale, steps});
      });
    });
  }
}

const AdamTask& adam_part(const AdamTask& task) { return task; }
const AdamTask& adam_part(const TemporalAdamTask& task) { return task.adam; }

// Counts a step of each chosen tensor, and leaves the constants of its rule in device memory.
template <typename F, typename Task>
auto* count_steps(const Stream& stream, const std::vector<Task>& tasks, const Indices& chosen) {
  using Rule = decltype(rule_of(tasks[0], F()));
  Rule* const rules = stream.scratch<Rule>(static_cast<int64_t>(tasks.size()));
  std::vector<CountItem> items;
  for (int64_t i : chosen) items.push_back({adam_part(tasks[i]).step, i});
  for_lists(items, [&](const List<CountItem>& some) {
    using Body = CountBody<Task, Rule, F>;
    launch(stream, (some.count + Body::kThreads - 1) / Body::kThreads, Body{some, tasks[0], rules});
  });
  return rules;
}

}  // namespace

void launch_resolve(const Stream& stream, const UpdateList& list, const std::vector<void*>& out) {
  std::vector<Dtype> dtypes;
  for (const ResolveTask& task : list.tasks) dtypes.push_back(task.sum_dtype);
  run(
      stream, list, dtypes, [](auto, const Indices&) { return StoreUpdates(); },
      [&](int64_t i) {
        StepItem item{};
        item.target = out[i];
        return item;
      });
}

void launch_sgd(const Stream& stream, const UpdateList& list, const std::vector<SgdTask>& tasks,
                const std::vector<Dtype>& dtypes) {
  run(
      stream, list, dtypes,
      [&](auto wide, const Indices&) {
        using F = decltype(wide);
        return SgdSteps<F>{sgd_of<F>(tasks[0]), tasks[0].first};
      },
      [&](int64_t i) {
        StepItem item{};
        item.target = tasks[i].param;
        item.state[0] = tasks[i].momentum_buffer;
        return item;
      });
}

void launch_adam(const Stream& stream, const UpdateList& list, const std::vector<AdamTask>& tasks,
                 const std::vector<Dtype>& dtypes) {
  run(
      stream, list, dtypes,
      [&](auto wide, const Indices& chosen) {
        using F = decltype(wide);
        return AdamSteps<F>{count_steps<F>(stream, tasks, chosen)};
      },
      [&](int64_t i) {
        StepItem item{};
        item.target = tasks[i].param;
        item.state[0] = tasks[i].exp_avg;
        item.state[1] = tasks[i].exp_avg_sq;
        item.state[2] = tasks[i].max_exp_avg_sq;
        return item;
      });
}

void launch_temporal_adam(const Stream& stream, const UpdateList& list,
                          const std::vector<TemporalAdamTask>& tasks,
                          const std::vector<Dtype>& dtypes) {
  run(
      stream, list, dtypes,
      [&](auto wide, const Indices& chosen) {
        using F = decltype(wide);
        return TemporalAdamSteps<F>{count_steps<F>(stream, tasks, chosen)};
      },
      [&](int64_t i) {
        StepItem item{};
        item.target = tasks[i].adam.param;
        item.state[0] = tasks[i].adam.exp_avg;
        item.state[1] = tasks[i].adam.exp_avg_sq;
        item.state[2] = tasks[i].sign_avg;
        return item;
      });
}

}  // namespace andmask
