#include "kernels/masked_mean.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "../checks.h"
#include "../math/agreement.h"
#include "tensors.h"

namespace andmask {
namespace {

// Columns are shared out in whole cache lines of output.
constexpr int64_t kColumnUnit = 64;

template <typename F>
void parallel_columns(int64_t columns, int64_t work_per_column, const F& f) {
  const int64_t units = (columns + kColumnUnit - 1) / kColumnUnit;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kColumnUnit * work_per_column));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    f(begin * kColumnUnit, std::min(end * kColumnUnit, columns));
  });
}

Tensor reduce(const char* op, const Tensor& grads, double tau, bool rescale, bool mask_only) {
  check_grads(op, grads);
  check_tau(op, tau);
  const Dtype dtype = check_dtype(op, "grads", grads);
  const auto shape = grads.sizes();
  const auto out_shape =
      torch::headeronly::IntHeaderOnlyArrayRef(shape.data() + 1, shape.size() - 1);
  // Rescaling needs the count of kept columns first, and then goes over what the first pass wrote.
  // Results of the 16-bit types wait for it in float32, so that they are rounded to 16 bits once. A
  // mask stays in float32: its factor may be beyond float16.
  const bool wide = (dtype == Dtype::float16 || dtype == Dtype::bfloat16) && (rescale || mask_only);
  const Tensor first = wide ? torch::stable::new_empty(grads, out_shape, ScalarType::Float)
                            : torch::stable::new_empty(grads, out_shape);
  const Tensor out = wide && !mask_only ? torch::stable::new_empty(grads, out_shape) : first;
  const int64_t columns = out.numel();
  if (columns == 0) return out;

  const Tensor rows = rows_are_contiguous(grads) ? grads : torch::stable::contiguous(grads);
  const int64_t environments = rows.size(0);
  const MaskedMeanTask task{
      rows.const_data_ptr(),
      environments,
      rows.stride(0),
      static_cast<int32_t>(vote_threshold(tau, environments)),
      mask_only ? Output::mask
      : rescale ? Output::masked_mean_wide
                : Output::masked_mean,
      first.mutable_data_ptr(),
  };
  const MaskedMeanKernels& kernels = masked_mean_kernels(active_isa());
  const auto reduce = kernels.reduce[static_cast<int>(dtype)];
  std::atomic<int64_t> kept{0};
  parallel_columns(columns, environments,
                   [&](int64_t begin, int64_t end) { kept += reduce(task, begin, end); });
  if (rescale) {
    const auto scale = kernels.scale[static_cast<int>(wide && mask_only ? Dtype::float32 : dtype)];
    const double factor = inverse_density(static_cast<double>(kept), static_cast<double>(columns));
    void* const target = out.mutable_data_ptr();
    parallel_columns(columns, 1, [&](int64_t begin, int64_t end) {
      scale(task.out, factor, target, begin, end);
    });
  }
  return out;
}

Tensor masked_mean_cpu(const Tensor& grads, double tau, bool rescale) {
  return reduce("andmask::masked_mean", grads, tau, rescale, /*mask_only=*/false);
}

Tensor agreement_mask_cpu(const Tensor& grads, double tau, bool rescale) {
  return reduce("andmask::agreement_mask", grads, tau, rescale, /*mask_only=*/true);
}

}  // namespace
}  // namespace andmask

STABLE_TORCH_LIBRARY_IMPL(andmask, CPU, m) {
  m.impl("masked_mean", TORCH_BOX(&andmask::masked_mean_cpu));
  m.impl("agreement_mask", TORCH_BOX(&andmask::agreement_mask_cpu));
}
