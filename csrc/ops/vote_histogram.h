// vote_histogram and vote_histograms: checks, layout, and the memory of the results.
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

inline Histograms histograms(const std::tuple<Tensor, Tensor>& out, int64_t environments) {
  return {environments, static_cast<int64_t*>(std::get<0>(out).mutable_data_ptr()),
          static_cast<double*>(std::get<1>(out).mutable_data_ptr())};
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
  device.vote_histogram(
      {rows.const_data_ptr(), rows.stride(0), columns, dtype, histograms(out, environments)});
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
  VoteHistogramList list;
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
    list.tasks.push_back({{sum[i].mutable_data_ptr(), votes[i].mutable_data_ptr(),
                           static_cast<int>(votes[i].element_size()), nullptr, nullptr},
                          dtype});
    list.sizes.push_back(sum[i].numel());
  }
  auto out = empty_histograms(sum[0], {static_cast<int64_t>(sum.size()), count + 1});
  list.out = histograms(out, count);
  device.vote_histograms(list);
  return out;
}

}  // namespace andmask
