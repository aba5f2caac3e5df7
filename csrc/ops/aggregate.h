// The op _aggregate: checks, and the memory of the results.
#pragma once

#include <optional>

#include "../tasks/aggregate.h"
#include "stacked.h"

namespace andmask {

inline void check_noise(const char* op, const Tensor& noise, const Tensor& grads, Dtype dtype) {
  if (!same_shape(grads, noise, 1)) {
    fail(op, "expected noise of the shape of one environment of grads ", shape_text(grads),
         ", but got ", shape_text(noise));
  }
  if (noise.scalar_type() != wide_type(dtype)) {
    fail(op, "expected noise of dtype ", dtype_text(wide_type(dtype)), " for grads of dtype ",
         dtype_text(grads), ", but got ", dtype_text(noise));
  }
}

template <typename Device>
Tensor aggregate(const Tensor& grads, std::string name, std::vector<double> arguments, bool rescale,
                 std::optional<Tensor> noise) {
  const char* const op = "andmask::_aggregate";
  check_grads(op, grads);
  const Dtype dtype = check_dtype(op, "grads", grads);
  const RuleInfo& rule =
      check_aggregate(name, arguments, grads.size(0), rescale, noise.has_value());
  if (noise) check_noise(op, *noise, grads, dtype);
  const Device device(op, grads);
  if (noise) device.check_here("noise", -1, *noise);

  const auto shape = grads.sizes();
  const torch::headeronly::IntHeaderOnlyArrayRef out_shape(shape.data() + 1, shape.size() - 1);
  const Tensor out = torch::stable::new_empty(grads, out_shape);
  if (out.numel() == 0) return out;
  const Tensor rows = rows_are_contiguous(grads) ? grads : torch::stable::contiguous(grads);
  const VoteTest test = test_of(op, rule, arguments, grads.size(0));
  if (!test.is_plain()) {
    update_of_stacked(device, rows, dtype, rule, arguments, test, rescale, /*mask_only=*/false,
                      out);
    return out;
  }
  // A statistic of the tensor takes a second pass. Until then 16-bit results are kept in float32.
  const bool waits = is_narrow(dtype) && (rescale || rule.fills_missing);
  const Tensor wide = waits ? torch::stable::new_empty(grads, out_shape, ScalarType::Float) : out;
  const Tensor noise_row = noise ? torch::stable::contiguous(*noise) : grads;
  run(device, AggregateTask{
                  .grads = rows.const_data_ptr(),
                  .environments = rows.size(0),
                  .stride = rows.stride(0),
                  .columns = out.numel(),
                  .dtype = dtype,
                  .moment_rule = rule.moment_rule,
                  .column_rule = rule.column_rule,
                  .arguments = arguments.data(),
                  .rescale = rescale,
                  .noise = noise ? noise_row.const_data_ptr() : nullptr,
                  .wide = wide.mutable_data_ptr(),
                  .out = out.mutable_data_ptr(),
              });
  return out;
}

}  // namespace andmask
