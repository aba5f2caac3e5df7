#include "kernels/masked_mean.h"

#include <atomic>

#include "../math/agreement.h"
#include "device.h"
#include "units.h"

namespace andmask {
namespace {

// Threads get columns in whole cache lines of output.
constexpr int64_t kColumnUnit = 64;

template <typename F>
void parallel_columns(int64_t columns, int64_t work_per_column, const F& f) {
  const int64_t units = (columns + kColumnUnit - 1) / kColumnUnit;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kColumnUnit * work_per_column));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    f(begin * kColumnUnit, std::min(end * kColumnUnit, columns));
  });
}

}  // namespace

void run(const Cpu&, const MaskedMeanTask& task) {
  const MaskedMeanKernels& kernels = masked_mean_kernels(active_isa());
  const auto reduce = kernels.reduce[static_cast<int>(task.dtype)];
  std::atomic<int64_t> kept{0};
  parallel_columns(task.columns, task.environments,
                   [&](int64_t begin, int64_t end) { kept += reduce(task, begin, end); });
  if (!task.scaled) return;
  const bool wide_mask = task.output == Output::mask && is_narrow(task.dtype);
  const auto scale = kernels.scale[static_cast<int>(wide_mask ? Dtype::float32 : task.dtype)];
  const double factor =
      inverse_density(static_cast<double>(kept), static_cast<double>(task.columns));
  parallel_columns(task.columns, 1, [&](int64_t begin, int64_t end) {
    scale(task.out, factor, task.scaled, begin, end);
  });
}

}  // namespace andmask
