// Histograms of votes on numpy arrays, for tests: the kernel of the CPU, and the CUDA body, thread
// by thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../cpu/kernels/vote_histogram.h"
#include "../tasks/vote_histogram.h"
#include "bindings.h"
#include "host_stream.h"

namespace py = pybind11;

namespace andmask {
namespace {

MomentArrays arrays(const py::array& sum, const py::array& votes) {
  return {const_cast<void*>(sum.data()), const_cast<void*>(votes.data()),
          static_cast<int>(votes.itemsize()), nullptr, nullptr};
}

// Returns counts and squares, [environments + 1], and true if all votes were possible.
py::tuple vote_histogram(const std::string& isa, const py::array& sum, const py::array& votes,
                         int64_t environments, bool lanes) {
  const int64_t bins = environments + 1;
  const int64_t count = lanes ? kBinLanes : 1;
  std::vector<VoteBin> bin_lanes(bins * count);
  const bool wide = parse_dtype(sum) == Dtype::float64;
  const bool possible =
      vote_histogram_kernels(parse_isa(isa))
          .add[wide](arrays(sum, votes), environments, 0, sum.shape(0), count, bin_lanes.data());
  py::array_t<int64_t> counts(bins);
  py::array_t<double> squares(bins);
  for (int64_t bin = 0; bin < bins; ++bin) {
    VoteBin total{};
    for (int64_t lane = 0; lane < count; ++lane) {
      total.squares += bin_lanes[bin * count + lane].squares;
      total.count += bin_lanes[bin * count + lane].count;
    }
    counts.mutable_at(bin) = static_cast<int64_t>(total.count);
    squares.mutable_at(bin) = total.squares;
  }
  return py::make_tuple(counts, squares, possible);
}

// Counts and squares, filled with zeros.
struct Cleared {
  py::array_t<int64_t> counts;
  py::array_t<double> squares;
  int64_t environments;

  Cleared(const std::vector<int64_t>& shape)
      : counts(shape), squares(shape), environments(shape.back() - 1) {
    std::fill_n(counts.mutable_data(), counts.size(), 0);
    std::fill_n(squares.mutable_data(), squares.size(), 0.0);
  }

  Histogram histogram(int64_t tensor = 0) {
    const int64_t first = tensor * (environments + 1);
    return {environments, counts.mutable_data() + first, squares.mutable_data() + first};
  }
};

py::tuple cuda_vote_histograms(const std::vector<py::array>& sum,
                               const std::vector<py::array>& votes, int64_t environments) {
  Cleared out({static_cast<int64_t>(sum.size()), environments + 1});
  std::vector<VoteHistogramTask> tasks;
  for (size_t i = 0; i < sum.size(); ++i) {
    tasks.push_back({.moments = arrays(sum[i], votes[i]),
                     .dtype = parse_dtype(sum[i]),
                     .columns = sum[i].shape(0),
                     .out = out.histogram(static_cast<int64_t>(i))});
  }
  run(HostStream(2), tasks);
  return py::make_tuple(out.counts, out.squares);
}

// grads: [environments, columns], rows contiguous.
py::tuple cuda_vote_histogram(const py::array& grads) {
  Cleared out({grads.shape(0) + 1});
  run(HostStream(2), StackedHistogramTask{.grads = grads.data(),
                                          .stride = grads.strides(0) / grads.itemsize(),
                                          .columns = grads.shape(1),
                                          .dtype = parse_dtype(grads),
                                          .out = out.histogram()});
  return py::make_tuple(out.counts, out.squares);
}

}  // namespace

ANDMASK_BINDINGS(m) {
  m.def("vote_histogram", &vote_histogram, py::arg("isa"), py::arg("sum"), py::arg("votes"),
        py::arg("environments"), py::arg("lanes"));
  m.def("cuda_vote_histograms", &cuda_vote_histograms);
  m.def("cuda_vote_histogram", &cuda_vote_histogram);
}

}  // namespace andmask
