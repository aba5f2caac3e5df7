// The ops masked_mean and agreement_mask: checks, and the memory of the results.
#pragma once

#include <optional>

#include "../tasks/masked_mean.h"
#include "stacked.h"

namespace andmask {

using Level = std::optional<double>;

// Returns the test that the arguments of an op ask for: at most one level; none is tau = 1.
inline VoteTest vote_test(const char* op, Level tau, Level fdr, Level significance,
                          const std::string& zeros, int64_t environments) {
  check(tau.has_value() + fdr.has_value() + significance.has_value() <= 1, op,
        "expected one of tau, fdr and significance, but got several");
  check(zeros == "count" || zeros == "abstain", op,
        "expected zeros to be \"count\" or \"abstain\", but got \"", zeros, "\"");
  VoteTest test{Criterion::tau, tau.value_or(1.0), zeros == "abstain"};
  if (fdr) test = {Criterion::fdr, *fdr, test.abstain};
  if (significance) test = {Criterion::significance, *significance, test.abstain};
  check_test(op, test, environments);
  return test;
}

template <typename Device>
Tensor reduce_environments(const char* op, const Tensor& grads, Level tau, bool rescale, Level fdr,
                           Level significance, const std::string& zeros, bool mask_only) {
  check_grads(op, grads);
  const VoteTest test = vote_test(op, tau, fdr, significance, zeros, grads.size(0));
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
  if (!test.is_plain()) {
    const std::vector<double> arguments = {test.level};
    update_of_stacked(device, rows, dtype, find_rule(op, "and_mask", arguments, environments, true),
                      arguments, test, rescale, mask_only, out);
    return out;
  }
  run(device, MaskedMeanTask{
                  .grads = rows.const_data_ptr(),
                  .environments = environments,
                  .stride = rows.stride(0),
                  .threshold = static_cast<int32_t>(vote_threshold(test.level, environments)),
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
Tensor masked_mean(const Tensor& grads, Level tau, bool rescale, Level fdr, Level significance,
                   std::string zeros) {
  return reduce_environments<Device>("andmask::masked_mean", grads, tau, rescale, fdr, significance,
                                     zeros, /*mask_only=*/false);
}

template <typename Device>
Tensor agreement_mask(const Tensor& grads, Level tau, bool rescale, Level fdr, Level significance,
                      std::string zeros) {
  return reduce_environments<Device>("andmask::agreement_mask", grads, tau, rescale, fdr,
                                     significance, zeros, /*mask_only=*/true);
}

}  // namespace andmask
