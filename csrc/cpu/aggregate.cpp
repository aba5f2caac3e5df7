#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "../errors.h"
#include "../math/sign_test.h"
#include "../tasks/aggregate.h"
#include "device.h"
#include "kernels/columns.h"
#include "kernels/masked_mean.h"
#include "kernels/steps.h"
#include "ranking.h"
#include "units.h"

namespace andmask {
namespace {

// Facts about a column rule that are needed before it runs.
struct ColumnFacts {
  bool fills;
  Ranking (*rank)(const double* arguments, int64_t environments);
};

template <typename... Rules>
ColumnFacts column_facts(int rule, RuleList<Rules...>) {
  constexpr ColumnFacts facts[] = {{Rules::kFillsMissing, make_ranking<Rules>}...};
  return facts[rule];
}

void scale(const AggregateTask& call, const Units& units, double factor) {
  const auto kernel = masked_mean_kernels(active_isa()).scale[static_cast<int>(call.dtype)];
  units.parallel(1, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    kernel(call.wide, factor, call.out, begin, end);
  });
}

// Accumulates the moments of a block of columns, and turns them into the update.
template <typename F>
void run_moments(const AggregateTask& call) {
  constexpr int64_t kTypes = static_cast<int64_t>(sizeof(F) == sizeof(double));
  const MomentKernels& kernels = moment_kernels(active_isa());
  const auto accumulate = kernels.accumulate_all[static_cast<int>(call.dtype)];
  const auto resolve = kernels.resolve[kTypes][call.moment_rule];
  const auto total_factor = kernels.total_factor[kTypes][call.moment_rule];
  const auto store = step_kernels(active_isa()).store[static_cast<int>(call.dtype)];
  const unsigned moments = moments_of(call.moment_rule, MomentRules());
  const VoteTest test{Criterion::tau,
                      tests_votes(call.moment_rule, MomentRules()) ? *call.arguments : 0};
  const auto thresholds = vote_thresholds(test, call.environments);
  const Units units({call.columns});
  std::vector<double> totals(units.count());
  units.parallel(call.environments, [&](int64_t, int64_t unit, int64_t begin, int64_t end) {
    alignas(64) F sum[kJoinedBlock];
    alignas(64) F squares[kJoinedBlock];
    alignas(64) F logs[kJoinedBlock];
    alignas(64) F update[kJoinedBlock];
    alignas(64) int32_t votes[kJoinedBlock];
    const MomentArrays arrays{sum, moments & kVotes ? votes : nullptr, sizeof(int32_t),
                              moments & kSquares ? squares : nullptr,
                              moments & kLogs ? logs : nullptr};
    const Update rule{.moments = arrays,
                      .sum_dtype = sizeof(F) == sizeof(double) ? Dtype::float64 : Dtype::float32,
                      .arguments = call.arguments,
                      .count = call.environments,
                      .test = test,
                      .thresholds = thresholds->table().data()};
    for (int64_t first = begin; first < end; first += kJoinedBlock) {
      const int64_t columns = std::min(kJoinedBlock, end - first);
      const void* const grads =
          static_cast<const char*>(call.grads) + first * item_size(call.dtype);
      accumulate(
          {.grads = grads, .rows = call.environments, .stride = call.stride, .moments = arrays},
          columns);
      if (call.rescale) {
        totals[unit] += total_factor(rule, 0, columns);
        resolve(rule, 1, 0, columns, static_cast<F*>(call.wide) + first);
      } else {
        resolve(rule, 1, 0, columns, update);
        store(update, call.out, first, first + columns);
      }
    }
  });
  if (!call.rescale) return;
  double total = 0;
  for (double unit : totals) total += unit;
  scale(call, units, inverse_density(total, static_cast<double>(call.columns)));
}

void run_columns(const Cpu& cpu, const AggregateTask& call) {
  const ColumnFacts facts = column_facts(call.column_rule, ColumnRules());
  ColumnTask task{};
  task.grads = call.grads;
  task.environments = call.environments;
  task.stride = call.stride;
  task.arguments = call.arguments;
  task.noise = call.noise;
  task.out = facts.fills ? call.wide : call.out;
  const Ranking ranking = facts.rank(call.arguments, call.environments);
  ranking.describe(task);
  const ColumnKernels& kernels = column_kernels(active_isa());
  const auto aggregate = kernels.aggregate[static_cast<int>(call.dtype)][call.column_rule];
  const Units units({call.columns});
  std::vector<Kept> kept(units.count());
  std::atomic<bool> enough_memory{true};
  units.parallel(call.environments, [&](int64_t, int64_t unit, int64_t begin, int64_t end) {
    if (!aggregate(task, begin, end, &kept[unit])) enough_memory = false;
  });
  check(enough_memory, cpu.op, "out of memory for columns of ", call.environments, " environments");
  if (!facts.fills) return;
  Kept all{};
  for (const Kept& unit : kept) {
    all.size += unit.size;
    all.count += unit.count;
  }
  const double size = all.count > 0 ? all.size / all.count : 0;
  const auto fill = kernels.fill[static_cast<int>(call.dtype)];
  units.parallel(1, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    fill(call.wide, call.noise, size, call.out, begin, end);
  });
}

}  // namespace

void run(const Cpu& cpu, const AggregateTask& task) {
  if (task.moment_rule < 0) {
    run_columns(cpu, task);
  } else if (task.dtype == Dtype::float64) {
    run_moments<double>(task);
  } else {
    run_moments<float>(task);
  }
}

}  // namespace andmask
