// Lists of moments on the CPU: accumulate_, resolve and the optimizer steps.
#include "kernels/moments.h"

#include "../math/agreement.h"
#include "device.h"
#include "kernels/steps.h"
#include "units.h"

namespace andmask {
namespace {

int width(Dtype dtype) {
  return static_cast<int>(dtype == Dtype::float64 ? Width::float64 : Width::float32);
}

// The factor of every tensor.
std::vector<double> scales(const UpdateList& list, const Units& units) {
  std::vector<double> scales(list.tasks.size(), 1.0);
  if (!list.rescale) return scales;
  const MomentKernels& kernels = moment_kernels(active_isa());
  std::vector<double> totals(units.count());
  units.parallel(1, [&](int64_t index, int64_t unit, int64_t begin, int64_t end) {
    const auto total_factor = kernels.total_factor[width(list.tasks[index].sum_dtype)][list.rule];
    totals[unit] = total_factor(list.tasks[index], begin, end);
  });
  for (size_t i = 0; i < scales.size(); ++i) {
    double total = 0;
    for (int64_t unit = units.first(i); unit < units.first(i + 1); ++unit) total += totals[unit];
    scales[i] = inverse_density(total, static_cast<double>(list.sizes[i]));
  }
  return scales;
}

// consume(index, begin, end, update): `update` holds columns [begin, end) in the wide type and is
// in L1. Block by block, moments are read before anything is written over them.
template <typename Consume>
void for_updates(const UpdateList& list, const Consume& consume) {
  const Units units(list.sizes);
  const std::vector<double> scales = andmask::scales(list, units);
  const MomentKernels& kernels = moment_kernels(active_isa());
  units.parallel(1, [&](int64_t index, int64_t, int64_t begin, int64_t end) {
    alignas(64) unsigned char update[kUpdateBlock * sizeof(double)];
    const ResolveTask& task = list.tasks[index];
    const auto resolve = kernels.resolve[width(task.sum_dtype)][list.rule];
    for (int64_t block = begin; block < end; block += kUpdateBlock) {
      const int64_t stop = std::min(block + kUpdateBlock, end);
      resolve(task, scales[index], block, stop, update);
      consume(index, block, stop, static_cast<const void*>(update));
    }
  });
}

// Runs kernels[dtype](tasks[i], ...) over all parameters.
template <typename Task>
void run_step(const UpdateList& list, const std::vector<Task>& tasks,
              const std::vector<Dtype>& dtypes,
              void (*const (&kernels)[kDtypes])(const Task&, const void*, int64_t, int64_t)) {
  for_updates(list, [&](int64_t index, int64_t begin, int64_t end, const void* update) {
    kernels[static_cast<int>(dtypes[index])](tasks[index], update, begin, end);
  });
}

}  // namespace

void Cpu::accumulate(const AccumulateList& list) const {
  if (list.tasks.empty()) return;
  const MomentKernels& kernels = moment_kernels(active_isa());
  const auto add = [&](int64_t index, int64_t, int64_t begin, int64_t end) {
    kernels.accumulate[static_cast<int>(list.dtypes[index])](list.tasks[index], begin, end);
  };
  Units(list.sizes).parallel(list.tasks[0].rows, add);
}

void Cpu::resolve(const UpdateList& list, const std::vector<void*>& out) const {
  const StepKernels& kernels = step_kernels(active_isa());
  for_updates(list, [&](int64_t index, int64_t begin, int64_t end, const void* update) {
    kernels.store[static_cast<int>(list.tasks[index].sum_dtype)](update, out[index], begin, end);
  });
}

void Cpu::sgd(const UpdateList& list, const std::vector<SgdTask>& tasks,
              const std::vector<Dtype>& dtypes) const {
  run_step(list, tasks, dtypes, step_kernels(active_isa()).sgd);
}

void Cpu::adam(const UpdateList& list, const std::vector<AdamTask>& tasks,
               const std::vector<Dtype>& dtypes) const {
  run_step(list, tasks, dtypes, step_kernels(active_isa()).adam);
}

void Cpu::temporal_adam(const UpdateList& list, const std::vector<TemporalAdamTask>& tasks,
                        const std::vector<Dtype>& dtypes) const {
  run_step(list, tasks, dtypes, step_kernels(active_isa()).temporal_adam);
}

}  // namespace andmask
