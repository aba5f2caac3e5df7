// aggregate: checks, and the memory of the results.
#pragma once

#include <optional>

#include "../tasks/aggregate.h"
#include "rules.h"

namespace andmask {

template <typename Device>
Tensor aggregate(const Tensor& grads, std::string name, std::vector<double> arguments, bool rescale,
                 std::optional<Tensor> noise) {
  const char* const op = "andmask::_aggregate";
  check_grads(op, grads);
  const Dtype dtype = check_dtype(op, "grads", grads);
  const NamedRule& rule = named_rule(op, name);
  check_rule(op, rule, arguments, rescale, grads.size(0));
  check_noise(op, rule, noise, grads);
  const Device device(op, grads);
  if (noise) device.check_here(op, "noise", -1, *noise);

  const auto shape = grads.sizes();
  const torch::headeronly::IntHeaderOnlyArrayRef out_shape(shape.data() + 1, shape.size() - 1);
  const Tensor out = torch::stable::new_empty(grads, out_shape);
  if (out.numel() == 0) return out;
  // A statistic of the tensor takes a second pass; till then 16-bit results wait in float32.
  const bool waits = is_narrow(dtype) && (rescale || rule.fills);
  const Tensor wide = waits ? torch::stable::new_empty(grads, out_shape, ScalarType::Float) : out;
  const Tensor rows = rows_are_contiguous(grads) ? grads : torch::stable::contiguous(grads);
  const Tensor noise_row = noise ? torch::stable::contiguous(*noise) : grads;
  device.aggregate({
      rows.const_data_ptr(),
      rows.size(0),
      rows.stride(0),
      out.numel(),
      dtype,
      rule.moment,
      rule.column,
      arguments.data(),
      rescale,
      noise ? noise_row.const_data_ptr() : nullptr,
      wide.mutable_data_ptr(),
      out.mutable_data_ptr(),
  });
  return out;
}

}  // namespace andmask
