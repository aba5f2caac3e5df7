// The ops masked_mean and agreement_mask: checks, and the memory of the results.
#pragma once

#include "../math/agreement.h"
#include "../tasks/masked_mean.h"
#include "checks.h"

namespace andmask {

template <typename Device>
Tensor reduce_environments(const char* op, const Tensor& grads, double tau, bool rescale,
                           bool mask_only) {
  check_grads(op, grads);
  check_tau(op, tau);
  const Dtype dtype = check_dtype(op, "grads", grads);
  const auto shape = grads.sizes();
  const auto out_shape =
      torch::headeronly::IntHeaderOnlyArrayRef(shape.data() + 1, shape.size() - 1);
  const Device device(op, grads);
  // Rescaling needs the number of kept columns, so that it takes a second pass. Until then results
  // of the 16-bit types are kept in float32, so that they are rounded to 16 bits once. A mask stays
  // in float32: its factor may be beyond float16.
  const bool wide = is_narrow(dtype) && (rescale || mask_only);
  const Tensor first = wide ? torch::stable::new_empty(grads, out_shape, ScalarType::Float)
                            : torch::stable::new_empty(grads, out_shape);
  const Tensor out = wide && !mask_only ? torch::stable::new_empty(grads, out_shape) : first;
  const int64_t columns = out.numel();
  if (columns == 0) return out;

  const Tensor rows = rows_are_contiguous(grads) ? grads : torch::stable::contiguous(grads);
  const int64_t environments = rows.size(0);
  run(device, MaskedMeanTask{
                  .grads = rows.const_data_ptr(),
                  .environments = environments,
                  .stride = rows.stride(0),
                  .threshold = static_cast<int32_t>(vote_threshold(tau, environments)),
                  .output = mask_only ? Output::mask
                            : rescale ? Output::masked_mean_wide
                                      : Output::masked_mean,
                  .out = first.mutable_data_ptr(),
                  .columns = columns,
                  .dtype = dtype,
                  .scaled = rescale ? out.mutable_data_ptr() : nullptr,
              });
  return out;
}

template <typename Device>
Tensor masked_mean(const Tensor& grads, double tau, bool rescale) {
  return reduce_environments<Device>("andmask::masked_mean", grads, tau, rescale,
                                     /*mask_only=*/false);
}

template <typename Device>
Tensor agreement_mask(const Tensor& grads, double tau, bool rescale) {
  return reduce_environments<Device>("andmask::agreement_mask", grads, tau, rescale,
                                     /*mask_only=*/true);
}

}  // namespace andmask
