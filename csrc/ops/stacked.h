// Rules whose test looks at all of a tensor, on stacked gradients: they go through moments.
#pragma once

#include "moment_lists.h"

namespace andmask {

inline ScalarType vote_type(int64_t environments) {
  return environments <= std::numeric_limits<int8_t>::max()    ? ScalarType::Char
         : environments <= std::numeric_limits<int16_t>::max() ? ScalarType::Short
                                                               : ScalarType::Int;
}

// Writes the update that a rule makes of stacked gradients, or with `mask_only` its factors, to
// `out`. The rows of `grads` are contiguous.
template <typename Device>
void update_of_stacked(const Device& device, const Tensor& grads, Dtype dtype, const RuleInfo& rule,
                       const std::vector<double>& arguments, const VoteTest& test, bool rescale,
                       bool mask_only, Tensor out) {
  const int64_t environments = grads.size(0);
  const auto empty = [&](ScalarType type) {
    return torch::stable::new_empty(grads, out.sizes(), type);
  };
  const Tensor sum = empty(wide_type(dtype));
  MomentLists lists{{sum}, {empty(vote_type(environments))}, {}, {}, {}};
  if (rule.moments & kSquares) lists.squares.push_back(empty(wide_type(dtype)));
  if (rule.moments & kLogs) lists.logs.push_back(empty(wide_type(dtype)));
  if (test.abstain) lists.voters.push_back(empty(vote_type(environments)));
  const MomentArrays moments = moment_arrays(lists, 0);
  const int64_t columns = out.numel();
  run(device, std::vector{AccumulateTask{.grads = grads.const_data_ptr(),
                                         .rows = environments,
                                         .stride = grads.stride(0),
                                         .moments = moments,
                                         .dtype = dtype,
                                         .columns = columns}});
  if (mask_only) torch::stable::fill_(sum, static_cast<double>(environments));  // the mean is 1
  const Tensor update = out.scalar_type() == wide_type(dtype) ? out : sum;
  run(device, std::vector{ResolveTask{
                  {.moments = moments,
                   .sum_dtype = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32,
                   .arguments = arguments.data(),
                   .count = environments,
                   .columns = columns,
                   .rule = rule.moment_rule,
                   .test = test,
                   .rescale = rescale},
                  update.mutable_data_ptr()}});
  if (out.scalar_type() != wide_type(dtype)) torch::stable::copy_(out, update);
}

}  // namespace andmask
