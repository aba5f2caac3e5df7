// The ops vote_histogram and _vote_histograms: checks, layout, and the memory of the results.
#pragma once

#include <tuple>

#include "../tasks/vote_histogram.h"
#include "moment_lists.h"

namespace andmask {

// Counts and squares, filled with zeros.
inline std::tuple<Tensor, Tensor> empty_histograms(const Tensor& like, std::vector<int64_t> shape) {
  return {torch::stable::new_zeros(like, shape, ScalarType::Long),
          torch::stable::new_zeros(like, shape, ScalarType::Double)};
}

// The histogram of one tensor of a list.
inline Histogram histogram(const std::tuple<Tensor, Tensor>& out, int64_t environments,
                           int64_t index = 0) {
  const int64_t first = index * (environments + 1);
  return {environments, static_cast<int64_t*>(std::get<0>(out).mutable_data_ptr()) + first,
          static_cast<double*>(std::get<1>(out).mutable_data_ptr()) + first};
}

template <typename Device>
std::tuple<Tensor, Tensor> vote_histogram(const Tensor& grads) {
  const char* const op = "andmask::vote_histogram";
  check_grads(op, grads);
  const Dtype dtype = check_dtype(op, "grads", grads);
  const Device device(op, grads);
  const int64_t environments = grads.size(0);
  auto out = empty_histograms(grads, {environments + 1});
  const int64_t columns = grads.numel() / environments;
  if (columns == 0) return out;
  const Tensor rows = rows_are_contiguous(grads) ? grads : torch::stable::contiguous(grads);
  run(device, StackedHistogramTask{.grads = rows.const_data_ptr(),
                                   .stride = rows.stride(0),
                                   .columns = columns,
                                   .dtype = dtype,
                                   .out = histogram(out, environments)});
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor> vote_histograms(Tensors sum, Tensors votes, int64_t count) {
  const char* const op = "andmask::_vote_histograms";
  check(!sum.empty(), op, "expected sum of at least 1 tensor, but got 0");
  check(votes.size() == sum.size(), op, "expected votes of ", sum.size(),
        " tensors, as sum has, but got ", votes.size());
  check_count(op, count);
  const Device device(op, sum[0]);
  check_here(device, {{"sum", sum}, {"votes", votes}});
  auto out = empty_histograms(sum[0], {static_cast<int64_t>(sum.size()), count + 1});
  std::vector<VoteHistogramTask> tasks;
  for (size_t i = 0; i < sum.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i);
    const Dtype dtype = check_dtype(op, "sum", sum[i], index);
    if (is_narrow(dtype)) {
      fail(op, "expected ", argument("sum", index), " of dtype float32 or float64, but got ",
           dtype_text(sum[i]));
    }
    check_votes(op, index, votes[i], count);
    if (!same_shape(votes[i], sum[i])) {
      fail(op, "expected ", argument("votes", index), " of shape ", shape_text(sum[i]),
           ", as sum has, but got ", shape_text(votes[i]));
    }
    Aligned().align({}, {&sum[i], &votes[i]});
    tasks.push_back({.moments = {.sum = sum[i].mutable_data_ptr(),
                                 .votes = votes[i].mutable_data_ptr(),
                                 .vote_bytes = static_cast<int>(votes[i].element_size())},
                     .dtype = dtype,
                     .columns = sum[i].numel(),
                     .out = histogram(out, count, index)});
  }
  run(device, tasks);
  return out;
}

}  // namespace andmask
