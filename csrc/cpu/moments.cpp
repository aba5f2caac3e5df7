// Moments of lists of tensors on the CPU: accumulate_, resolve and the optimizer steps.
#include "kernels/moments.h"

#include <numeric>

#include "../math/agreement.h"
#include "device.h"
#include "kept.h"
#include "kernels/steps.h"
#include "units.h"

namespace andmask {
namespace {

int width(Dtype dtype) {
  return static_cast<int>(dtype == Dtype::float64 ? Width::float64 : Width::float32);
}

std::vector<int64_t> sizes_of(const std::vector<Update>& updates) {
  std::vector<int64_t> sizes;
  for (const Update& update : updates) sizes.push_back(update.columns);
  return sizes;
}

// The factor by which each update is scaled.
std::vector<double> scales(const std::vector<Update>& updates, const Units& units, Kept& kept) {
  std::vector<double> scales(updates.size(), 1.0);
  if (updates.empty() || !updates[0].rescale) return scales;
  const auto scale = [&](size_t i, double total) {
    scales[i] = inverse_density(total, static_cast<double>(updates[i].columns));
  };
  if (masks_by_test(updates[0].rule, MomentRules())) {
    for (size_t i = 0; i < scales.size(); ++i) scale(i, static_cast<double>(kept.counts()[i]));
    return scales;
  }
  const MomentKernels& kernels = moment_kernels(active_isa());
  std::vector<double> totals(units.count());
  units.parallel(1, [&](int64_t index, int64_t unit, int64_t begin, int64_t end) {
    const Update& update = updates[index];
    totals[unit] = kernels.total_factor[width(update.sum_dtype)][update.rule](update, begin, end);
  });
  for (size_t i = 0; i < scales.size(); ++i) {
    double total = 0;
    for (int64_t unit = units.first(i); unit < units.first(i + 1); ++unit) total += totals[unit];
    scale(i, total);
  }
  return scales;
}

// Calls consume(index, unit, block, begin, end) for all blocks of all updates. `block` holds the
// update of columns [begin, end) in the wide type, in L1. The moments of a block are read before
// consume may overwrite them.
template <typename Consume>
void for_updates(std::vector<Update> updates, const Units& units, const Consume& consume) {
  Kept kept(updates, units);
  const std::vector<double> scales = andmask::scales(updates, units, kept);
  const MomentKernels& kernels = moment_kernels(active_isa());
  units.parallel(1, [&](int64_t index, int64_t unit, int64_t begin, int64_t end) {
    alignas(64) unsigned char block_update[kUpdateBlock * sizeof(double)];
    const Update& update = updates[index];
    const auto resolve = kernels.resolve[width(update.sum_dtype)][update.rule];
    for (int64_t block = begin; block < end; block += kUpdateBlock) {
      const int64_t stop = std::min(block + kUpdateBlock, end);
      resolve(update, scales[index], block, stop, block_update);
      consume(index, unit, static_cast<const void*>(block_update), block, stop);
    }
  });
}

// Calls step(task, block, begin, end) for all blocks of all tasks.
template <typename Task, typename Step>
void for_steps(const std::vector<Task>& tasks, const Step& step) {
  std::vector<Update> updates;
  for (const Task& task : tasks) updates.push_back(task.update);
  const Units units(sizes_of(updates));
  for_updates(std::move(updates), units,
              [&](int64_t index, int64_t, const void* block, int64_t begin, int64_t end) {
                step(tasks[index], block, begin, end);
              });
}

template <typename Task>
void run_steps(const std::vector<Task>& tasks,
               void (*const (&kernels)[kDtypes])(const Task&, const void*, int64_t, int64_t)) {
  for_steps(tasks, [&](const Task& task, const void* update, int64_t begin, int64_t end) {
    kernels[static_cast<int>(task.dtype)](task, update, begin, end);
  });
}

}  // namespace

void run(const Cpu&, const std::vector<AccumulateTask>& tasks) {
  if (tasks.empty()) return;
  const MomentKernels& kernels = moment_kernels(active_isa());
  std::vector<int64_t> sizes;
  for (const AccumulateTask& task : tasks) sizes.push_back(task.columns);
  Units(sizes).parallel(tasks[0].rows, [&](int64_t index, int64_t, int64_t begin, int64_t end) {
    kernels.accumulate[static_cast<int>(tasks[index].dtype)](tasks[index], begin, end);
  });
}

void run(const Cpu&, const std::vector<ResolveTask>& tasks) {
  const StepKernels& kernels = step_kernels(active_isa());
  for_steps(tasks, [&](const ResolveTask& task, const void* update, int64_t begin, int64_t end) {
    kernels.store[static_cast<int>(task.update.sum_dtype)](update, task.out, begin, end);
  });
}

void run(const Cpu&, const SquaredNormTask& task) {
  const MomentKernels& kernels = moment_kernels(active_isa());
  const Units units(sizes_of(task.updates));
  std::vector<double> parts(units.count());
  for_updates(task.updates, units,
              [&](int64_t index, int64_t unit, const void* block, int64_t begin, int64_t end) {
                const int kind = width(task.updates[index].sum_dtype);
                parts[unit] += kernels.squared_norm[kind](block, end - begin);
              });
  // In the order of the units, so that the number of threads does not matter.
  *task.out = std::accumulate(parts.begin(), parts.end(), 0.0);
}

void run(const Cpu&, const VoteThresholdsTask& task) {
  std::vector<Update> updates = task.updates;
  const Units units(sizes_of(updates));
  Kept kept(updates, units);
  const Update& first = updates[0];
  const int64_t size = first.test.abstain ? first.count + 1 : 1;
  for (size_t i = 0; i < updates.size(); ++i) {
    std::copy_n(updates[i].thresholds, size, task.thresholds + static_cast<int64_t>(i) * size);
  }
  std::copy(kept.counts().begin(), kept.counts().end(), task.kept);
  std::copy(kept.tested().begin(), kept.tested().end(), task.tested);
}

void run(const Cpu&, const std::vector<SgdTask>& tasks) {
  run_steps(tasks, step_kernels(active_isa()).sgd);
}

void run(const Cpu&, const std::vector<AdamTask>& tasks) {
  run_steps(tasks, step_kernels(active_isa()).adam);
}

void run(const Cpu&, const std::vector<TemporalAdamTask>& tasks) {
  run_steps(tasks, step_kernels(active_isa()).temporal_adam);
}

}  // namespace andmask
